"""Putting a process's box of a tensor where it belongs in a file of the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.file_chunks import write_at
from arriero.formats.parts import Part, Placement
from arriero.formats.safe_tensors import LazyTensor


def write_box(
    descriptor: int,
    name: str,
    value: Tensor | LazyTensor | Part,
    dtype: torch.dtype,
    start: int,
    writer: ChunkWriter,
) -> None:
    """Make a tensor or part, cast it and write it; a whole one may not be written when this returns.

    Args:
        start: where the whole tensor begins in the file, in bytes.
        writer: of whole tensors.

    Raises:
        OSError: when it cannot be written.
        FormatError: when it is not of the size that was announced.
    """
    placement = placement_of(value)
    if not isinstance(value, Part) or placement.is_whole:
        writer.put(descriptor, start, name, value.tensor if isinstance(value, Part) else value, dtype=dtype)
        return
    tensor = value.tensor.detach()
    if tuple(tensor.shape) != placement.size:
        raise FormatError(f"{name} is {tuple(tensor.shape)}, {placement.size} was announced")
    if tensor.numel() == 0:
        return
    content = tensor.to(device="cpu", dtype=dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
    length = _run_length(placement) * dtype.itemsize
    for number, at in enumerate(_run_starts(placement)):
        write_at(descriptor, content[number * length : (number + 1) * length], start + at * dtype.itemsize)


def _run_length(placement: Placement) -> int:
    """Numbers of a box that lie one after the other in the whole tensor."""
    length = 1
    for size, whole in zip(reversed(placement.size), reversed(placement.shape), strict=True):
        length *= size
        if size != whole:
            break
    return length


def _run_starts(placement: Placement) -> Iterator[int]:
    """Where each run of a box begins in the whole tensor, in numbers."""
    partial = [dim for dim, size in enumerate(placement.size) if size != placement.shape[dim]]
    outer = partial[-1] if partial else 0  # dimensions before the last one that is cut
    strides = [prod(placement.shape[dim + 1 :]) for dim in range(len(placement.shape))]
    base = sum(start * stride for start, stride in zip(placement.offset, strides, strict=True))
    for number in range(prod(placement.size[:outer])):
        at, rest = base, number
        for dim in reversed(range(outer)):
            rest, index = divmod(rest, placement.size[dim])
            at += index * strides[dim]
        yield at


def placement_of(value: Tensor | LazyTensor | Part) -> Placement:
    """Where what this process holds of a tensor lies in it."""
    return value.placement if isinstance(value, Part) else Placement.whole(tuple(value.shape))
