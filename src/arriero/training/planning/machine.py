"""The device that is planned for: its memory and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from arriero.errors import ConfigError
from arriero.training.flops import DEVICE_PEAKS, peak_flops

# Bytes by the names of DEVICE_PEAKS, from the same data sheets; where a GPU is sold in several sizes, the largest.
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
# Share of the peak that training reaches where nothing is known. GPU: Llama 3 reports 38 to 43 % (arXiv:2407.21783, table 4).
# CPU: this package reached 61 to 86 % of its measured matrix product (README).
DEFAULT_UTILIZATION = {"cuda": 0.4, "cpu": 0.7}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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


def find_gpu(name: str) -> str:
    """The name in `DEVICE_PEAKS` that a user's word stands for.

    Raises:
        ConfigError: none does.
    """
    word = name.strip().lower()
    for known in sorted(DEVICE_PEAKS, key=len, reverse=True):
        if known.lower() in word or word == known.lower().replace(" ", ""):
            return known
    raise ConfigError(f"--gpu {name!r} is not known: known are {', '.join(DEVICE_PEAKS)}; or give --memory and --flops")


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
    known = find_gpu(gpu) if gpu is not None else None
    here = device == "cpu" or torch.cuda.is_available()
    sheet = f"{known} data sheet"
    found = (memory, "given") if memory is not None else (int(DEVICE_MEMORY[known]), sheet) if known else None
    if found is None and not here:
        raise ConfigError(
            "--device gpu: this machine has no GPU: say which one is meant with --gpu NAME, or --memory SIZE"
        )
    amount, source = found or _memory_here(device)
    if flops is not None:
        return Machine(amount, source, flops, "given")
    if known is not None:
        half = compute_dtype != "float32"
        return Machine(amount, source, DEVICE_PEAKS[known][half] * 1e12, sheet)
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
    try:
        limit = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or its word "max"
        return free, source
    return (limit, "limit of this container") if limit < free else (free, source)
