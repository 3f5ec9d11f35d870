"""Tensors whose numbers are those of another one, in another order: transposed, with other rows, or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.formats.safe_tensors import LazyTensor

_TILE = (
    64  # rows of a matrix that are transposed at once: 128 bytes of a half precision, two lines of a processor's cache
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Rearranged(LazyTensor):
    """A tensor that is a view of another one, to be put in order when it is written, some rows at a time.

    Attributes:
        base: the other one.
        view: of the loaded base; its numbers, row by row, are those of this tensor. It may have more dimensions than it.
    """

    base: Tensor | LazyTensor
    view: Callable[[Tensor], Tensor]


def rearranged(base: Tensor | LazyTensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Rearranged:
    """The tensor of this shape that a view of another one is; see `Rearranged`."""
    return Rearranged(shape, base.dtype, partial(_load, base, shape, view), base, view)


def _load(base: Tensor | LazyTensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    return view(base.load() if isinstance(base, LazyTensor) else base).reshape(shape)


def in_order(view: Tensor) -> Tensor:
    """A contiguous tensor of a view's numbers, bit by bit, the transpose of a matrix two to three times as fast as torch's.

    By NumPy, which leaves its thread's processor alone: several threads put a tensor in order, each its rows.

    Args:
        view: on the CPU, of any strides.
    """
    if view.is_contiguous():
        return view
    numbers: NDArray[np.signedinteger] = view.detach().view(_INTEGERS[view.element_size()]).numpy()
    made = np.empty(numbers.shape, numbers.dtype)
    if numbers.ndim == 2 and numbers.strides[0] < numbers.strides[1]:
        for start in range(0, numbers.shape[1], _TILE):
            made[:, start : start + _TILE] = numbers[:, start : start + _TILE]
    else:
        made[...] = numbers
    return torch.from_numpy(made).view(view.dtype)
