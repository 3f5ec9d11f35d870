"""The device that is planned for: its memory and its arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from arriero.engine.machine_memory import container_limit
from arriero.errors import ConfigError
from arriero.training.flops import DEVICE_PEAKS, known_device, peak_flops

# Bytes by the names of DEVICE_PEAKS, from the same data sheets; where a GPU is sold in several sizes, the largest, unless its
# name says another.
DEVICE_MEMORY = {
    "H200": 141e9,
    "H100 PCIe": 80e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "RTX 4090": 24e9,
    "A10": 24e9,
    "V100": 32e9,
    "T4": 16e9,
}
# Those whose matrix units know fp16 and no bf16, which is computed as fp32 is.
WITHOUT_BF16 = ("V100", "T4")
# Those that multiply 8-bit floats: of compute capability 8.9 or more.
WITH_FP8 = ("H200", "H100 PCIe", "H100", "L40S", "RTX 4090")
# Share of the peak that training reaches where nothing is known. GPU: Llama 3 reports 38 to 43 % (arXiv:2407.21783, table 4).
# CPU: this package reached 61 to 86 % of its measured matrix product (README).
DEFAULT_UTILIZATION = {"cuda": 0.4, "cpu": 0.7}
# The same of GPUs while they compute, for layouts whose waiting is counted apart: what Llama 3's 43 % on 8,192 GPUs (table 4)
# leaves once this package's counts of the pipeline's bubble and of tensor parallelism are taken off; see docs/scaling.md.
COMPUTING_UTILIZATION = 0.53
GPUS_IN_NODE = 8
# GB/s each way of one GPU, by the names of DEVICE_PEAKS: to the others of its node and to other nodes. NVLink, half of the
# data sheets' sum of both directions: H100 and H200 900, A100 600, V100 300. PCIe x16 elsewhere: generation 5 64, 4 32, 3 16.
# Networks: DGX H100 and H200 400 Gb/s a GPU (Llama 3's machines too, section 3.3.1), DGX A100 200, DGX-1 V100 four of 100 for
# 8; for cards that are sold without one, 100 Gb/s a GPU is assumed.
DEVICE_LINKS = {
    "H200": (450.0, 50.0),
    "H100 PCIe": (64.0, 50.0),
    "H100": (450.0, 50.0),
    "A100": (300.0, 25.0),
    "L40S": (32.0, 12.5),
    "RTX 4090": (32.0, 12.5),
    "A10": (32.0, 12.5),
    "V100": (150.0, 6.25),
    "T4": (16.0, 12.5),
}
# Share of a link's nominal bandwidth that collectives reach: an assumption, not measured here.
LINK_UTILIZATION = 0.8
# Seconds that each message of a ring waits, in a node and between nodes: the figures by which NCCL itself chooses (hwLat in its
# src/graph/tuning.cc: ring, Simple protocol).
MESSAGE_DELAYS = (3.4e-6, 14.0e-6)


@dataclass(frozen=True)
class Links:
    """What a device can send, in bytes a second.

    Attributes:
        in_node: to the devices of its node.
        between: to other nodes.
        source: where the figures come from, for the reader.
    """

    in_node: float
    between: float
    source: str

    def bandwidth(self, members: int, stride: int) -> float:
        """Of each device in a group of `members` whose ranks are `stride` apart.

        A ring over nodes leaves each node by one link for every member there, as each of them has its own.
        """
        if members * stride <= GPUS_IN_NODE:
            return self.in_node
        return min(self.in_node, max(1, GPUS_IN_NODE // stride) * self.between)

    @staticmethod
    def delay(members: int, stride: int) -> float:
        """Seconds of one message in such a group's ring, in the mean: it passes each node once."""
        inside, outside = MESSAGE_DELAYS
        nodes = math.ceil(members / max(1, GPUS_IN_NODE // stride))
        return inside if nodes == 1 else (inside * (members - nodes) + outside * (nodes - 1)) / (members - 1)


def find_links(gpu: str | None, in_node: float | None, between: float | None) -> Links | None:
    """The links of a GPU; None where nothing is known of it.

    Args:
        in_node, between: GB/s that were given, taken as they are; data sheets' figures are lowered to what is reached.
    """
    sheet = DEVICE_LINKS.get(find_gpu(gpu)[0]) if gpu is not None else None
    if sheet is None and (in_node is None or between is None):
        return None
    known = [
        given if given is not None else found * LINK_UTILIZATION
        for given, found in zip((in_node, between), sheet or (0, 0), strict=True)
    ]
    given = (in_node is not None) + (between is not None)
    source = ("data sheet, 80 % of it", "data sheet and given", "given")[given]
    return Links(known[0] * 1e9, known[1] * 1e9, source)


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        memory: bytes that a run may use.
        memory_source, flops_source: where the figures come from, for the reader.
        flops: floating-point operations a second at its peak; None if not known.
    """

    memory: int
    memory_source: str
    flops: float | None
    flops_source: str


def find_gpu(name: str) -> tuple[str, int | None]:
    """The name in `DEVICE_PEAKS` that a user's word stands for, and the GB of memory where it says them.

    Raises:
        ConfigError: it stands for none.
    """
    found = known_device(name)
    if found is None:
        known = ", ".join(DEVICE_PEAKS)
        raise ConfigError(f"--gpu {name!r} is not known: known are {known}; or give --memory and --flops in its place")
    return found


def find_machine(
    device: str, compute_dtype: str, *, gpu: str | None, memory: int | None, flops: float | None
) -> Machine:
    """The device of the options; what they leave open is looked up, or measured here.

    Args:
        device: "cpu" or "cuda".
        gpu, memory, flops: what was given.

    Raises:
        ConfigError: the memory of a GPU is asked for on a machine that has none; an unknown `gpu`.
    """
    known, size = find_gpu(gpu) if gpu is not None else (None, None)
    here = device == "cpu" or torch.cuda.is_available()
    sheet = f"{known} data sheet"
    found = (memory, "given") if memory is not None else None
    if found is None and known is not None:
        found = (size * 10**9, f"{known} of {size} GB") if size is not None else (int(DEVICE_MEMORY[known]), sheet)
    if found is None and not here:
        raise ConfigError(
            "--device gpu: this machine has no GPU: say which one is meant with --gpu NAME, or --memory SIZE"
        )
    amount, source = found or _memory_here(device)
    if flops is not None:
        return Machine(amount, source, flops, "given")
    if known is not None:
        emulated = compute_dtype == "bfloat16" and known in WITHOUT_BF16
        half = compute_dtype != "float32" and not emulated
        told = f"{sheet}: fp32, for it has no units for bf16; --fp16 has" if emulated else sheet
        return Machine(amount, source, DEVICE_PEAKS[known][half] * 1e12, told)
    if not here:
        return Machine(amount, source, None, "not known: give --gpu or --flops")
    peak, measured = peak_flops(torch.device(device), getattr(torch, compute_dtype))
    threads = torch.get_num_threads()
    on = f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else ""
    return Machine(amount, source, peak, measured + on)


def _memory_here(device: str) -> tuple[int, str]:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory, "this machine's GPU"
    free, source = psutil.virtual_memory().available, "available on this machine"
    limit = container_limit()
    return (limit, "limit of this container") if limit is not None and limit < free else (free, source)
