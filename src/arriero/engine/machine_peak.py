"""What a machine can reach at best, measured: arithmetic by a matrix product, memory by a sum."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from arriero.models.packed_linear import BF16_PRODUCTS
from arriero.models.products import fast_products, product
from arriero.processor_info import features, model_name

# Linux' names of what multiplies numbers of a type, on x86 and on ARM.
_HALF_PRODUCTS = {torch.bfloat16: BF16_PRODUCTS, torch.float16: {"amx_fp16", "avx512_fp16", "asimdhp"}}


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, as training calls it, the best of some.

    In fp32 on a CPU that has no instructions for products of `dtype`: it emulates them, and their own peak would flatter what
    is computed by them.
    """
    size, rounds = (1024, 10) if device.type == "cpu" else (4096, 20)
    if device.type == "cpu" and not _HALF_PRODUCTS.get(dtype, set()) & features():
        dtype = torch.float32
    # no random numbers: a resumed run must find the generators as they were
    a = torch.linspace(0.0, 1.0, size * size, device=device, dtype=dtype).view(size, size)
    with fast_products(one_shape=True):
        return 2.0 * size**3 / _least_seconds(lambda: product(a, a), device, rounds)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read in a sum over more memory than the caches hold, the best of some."""
    size, rounds = (1 << 26, 10) if device.type == "cpu" else (1 << 28, 20)
    numbers = torch.ones(size, device=device)
    return size * numbers.element_size() / _least_seconds(numbers.sum, device, rounds)


def machine_name(device: torch.device) -> str:
    """The model of the GPU or CPU, as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return model_name() or platform.processor() or platform.machine()


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
