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

# Rows of a matrix that are transposed at once, from a copy whose rows are a line of the cache further apart: in matrices of
# 4,096 columns the same places of all rows share a few lines of the cache, and each of them is read again and again.
_TILE, _LEAST_TILE, _TILE_NUMBERS, _LINE = 256, 32, 2**17, 64
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


def in_order(view: Tensor, memory: Callable[[int], memoryview] | None = None) -> Tensor:
    """A contiguous tensor of a view's numbers, bit by bit, the transpose of a matrix several times as fast as torch's.

    By NumPy, which leaves its thread's processor alone: several threads put a tensor in order, each its rows.

    Args:
        view: on the CPU, of any strides.
        memory: gives so many bytes to put them into, where they are not in order already; None: new ones.
    """
    if view.is_contiguous():
        return view
    numbers: NDArray[np.signedinteger] = view.detach().view(_INTEGERS[view.element_size()]).numpy()
    if memory is None:
        made = np.empty(numbers.shape, numbers.dtype)
    else:
        made = np.frombuffer(memory(numbers.nbytes), numbers.dtype, numbers.size).reshape(numbers.shape)
    if numbers.ndim == 2 and numbers.strides[0] < numbers.strides[1]:
        width = len(numbers)
        height = max(_LEAST_TILE, min(_TILE, _TILE_NUMBERS // width))
        near = np.empty((height, width + _LINE // numbers.itemsize), numbers.dtype)[:, :width]
        for start in range(0, numbers.shape[1], height):
            tile = numbers[:, start : start + height].T
            near[: len(tile)] = tile
            made[:, start : start + height] = near[: len(tile)].T
    else:
        made[...] = numbers
    return torch.from_numpy(made).view(view.dtype)
