"""fp32 matrix products by oneDNN, which torch has beside MKL but calls for other formats only.

MKL keeps to 256-bit instructions on AMD's processors, oneDNN uses 512-bit ones. Where these are computed at once, on Zen 5 and
later, it is 2.3 times as fast (docs/performance.md).
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor, nn

from arriero.processor_info import has_units_that_mkl_leaves

# Multiplications from which oneDNN gains more than its call costs, with what autograd adds to that.
LEAST = 1 << 24
# It compiles kernels for each shape of a product, 0.2 to 1.3 MiB of them. A training step calls it with about 25 shapes, and
# attention with 4 for each of its numbers of keys (`models/onednn_attention.py`): 16 in rows of 2,048 tokens. Compiling them
# anew in every layer costs an eighth of a step.
KEPT_SHAPES = 128
# oneDNN's own, and that of torch's calls of it; each is read with the first call.
_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_PLAIN = (Tensor, nn.Parameter)


@cache
def has_onednn() -> bool:
    """Whether torch can call oneDNN's product."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.aten, "mkldnn_linear_backward_weights")
    )


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products of many rows are oneDNN's rather than MKL's on this processor."""
    return has_units_that_mkl_leaves() and has_onednn()


def limit_kept_kernels() -> None:
    """Limit the compiled kernels that this process keeps, where the environment has no other number; before the first call."""
    for name in _LIMITS:
        os.environ.setdefault(name, str(KEPT_SHAPES))


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN can be called for a product of these."""
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and type(a) in _PLAIN
        and type(b) in _PLAIN
    )


def is_suited(rows: int, a: Tensor, b: Tensor) -> bool:
    """The same for a product of so many rows of `a` with a matrix, in training: if it is large enough for the call to pay."""
    return rows * b.numel() >= LEAST and takes(a, b)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN, without gradients; fp32, and rows or columns of the weight without gaps."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y
