"""What this machine reaches at best: matrix products by both libraries that are used, copying and reading memory.

python benchmarks/peaks.py            all threads
OMP_NUM_THREADS=1 python benchmarks/peaks.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from arriero.engine.machine_peak import read_bandwidth
from arriero.models.packed_linear import PackedLinear, has_kernels

SIZE, ROUNDS = 1024, 10
NUMBERS = 1 << 26  # of a copy: 256 MiB, more than the caches hold


@dataclass(frozen=True)
class Peaks:
    """The best of some rounds.

    Attributes:
        mkl: FLOP/s of `torch.mm`, as training calls it on most processors.
        onednn: FLOP/s of oneDNN with weights in its own layout, as the engine calls it; that of `mkl` where it is not there.
        copy: bytes a second that are copied, each read once and written once: the bytes of one side.
        read: bytes a second that a sum reads.
    """

    mkl: float
    onednn: float
    copy: float
    read: float

    @property
    def flops(self) -> float:
        """Of the faster library."""
        return max(self.mkl, self.onednn)

    def best(self, other: Peaks) -> Peaks:
        """Of two measurements: other programs only ever take from a peak."""
        mine, theirs = asdict(self), asdict(other)
        return Peaks(**{name: max(value, theirs[name]) for name, value in mine.items()})


def _least(work: Callable[[], object]) -> float:
    """Seconds, after one round that is not counted."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def onednn_flops() -> float:
    """FLOP/s of a square product by oneDNN, 0 where torch has no such kernels."""
    device = torch.device("cpu")
    if not has_kernels(device, torch.float32):
        return 0.0
    with torch.inference_mode():
        layer = PackedLinear([nn.Linear(SIZE, SIZE, bias=False)], copy=True)
        x = torch.linspace(0.0, 1.0, SIZE * SIZE).view(SIZE, SIZE)
        return 2.0 * SIZE**3 / _least(lambda: layer(x))


def copy_bandwidth() -> float:
    source = torch.ones(NUMBERS)
    target = torch.empty_like(source)
    return NUMBERS * source.element_size() / _least(lambda: target.copy_(source))


def measure_here() -> Peaks:
    """With the threads that this process has."""
    a = torch.linspace(0.0, 1.0, SIZE * SIZE).view(SIZE, SIZE)
    mkl = 2.0 * SIZE**3 / _least(lambda: a @ a)
    return Peaks(mkl, onednn_flops() or mkl, copy_bandwidth(), read_bandwidth(torch.device("cpu")))


def measure(threads: int) -> Peaks:
    """In a process of its own with so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return Peaks(**json.loads(told.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here())))
