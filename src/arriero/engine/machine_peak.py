"""What a machine can reach at best, measured: arithmetic by a matrix product, memory by a sum."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of some; on a CPU always in fp32."""
    size, rounds = (1024, 10) if device.type == "cpu" else (4096, 20)
    if device.type == "cpu":
        dtype = torch.float32  # half precision is emulated on most CPUs: a peak of it would flatter
    # no random numbers: a resumed run must find the generators as they were
    a = torch.linspace(0.0, 1.0, size * size, device=device, dtype=dtype).view(size, size)
    return 2.0 * size**3 / _least_seconds(lambda: a @ a, device, rounds)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read in a sum over more memory than the caches hold, the best of some."""
    size, rounds = (1 << 26, 10) if device.type == "cpu" else (1 << 28, 20)
    numbers = torch.ones(size, device=device)
    return size * numbers.element_size() / _least_seconds(numbers.sum, device, rounds)


def machine_name(device: torch.device) -> str:
    """The model of the GPU or CPU, as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has been told to do; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _least_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
