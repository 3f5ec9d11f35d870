"""Arrays that stay in their file until they are asked for, whole or a box of them."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from arriero.errors import FormatError

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**56

_CHUNK = 4 * 2**20


def is_shape(shape: Sequence[object]) -> bool:
    """Whether these are sizes that torch can compute with, also where one of them is 0."""
    if len(shape) > MAX_DIMENSIONS:
        return False
    sizes = [size for size in shape if type(size) is int and 0 <= size <= MAX_ELEMENTS]
    return len(sizes) == len(shape) and prod(max(size, 1) for size in sizes) <= MAX_ELEMENTS


class Payload(Protocol):
    """The bytes of an array, in the order of its file."""

    @property
    def nbytes(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) as uint8 (stop - start,): a view of the file if they lie in it as they are."""
        ...


@dataclass(frozen=True)
class FileBytes:
    """Bytes of a mapped file.

    Attributes:
        content: the file, mapped copy-on-write.
        at: where they begin.
        nbytes: how many there are.
    """

    content: mmap.mmap
    at: int
    nbytes: int

    def read(self, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        # Through NumPy, which keeps the map from being closed under the tensor; torch.frombuffer alone does not.
        return torch.from_numpy(np.frombuffer(self.content, np.uint8, stop - start, self.at + start))


@dataclass(frozen=True)
class Latin1Bytes:
    """Bytes written as text, each a character of Latin-1, in UTF-8: all that pickle's protocol 2 has for bytes.

    Attributes:
        path: of the file, for messages.
        content: the file.
        at: where the text begins.
        length: of the text, in bytes of the file.
        nbytes: of the array.
    """

    path: Path
    content: mmap.mmap
    at: int
    length: int
    nbytes: int

    def read(self, start: int, stop: int) -> Tensor:
        # A character is one byte or two, so that the beginning has to be decoded to find the rest.
        result = bytearray(stop - start)
        at, end, done = self.at, self.at + self.length, 0
        while at < end and (done < stop or stop == self.nbytes):
            limit = min(at + _CHUNK, end)
            if limit < end and self.content[limit] & 0xC0 == 0x80:
                limit -= 1
            try:
                part = self.content[at:limit].decode("utf-8").encode("latin-1")
            except UnicodeError as error:
                raise FormatError(
                    f"{self.path}: the array at byte {self.at} is not Latin-1 text; fetch it again"
                ) from error
            low, high = max(start, done), min(stop, done + len(part))
            if low < high:
                result[low - start : high - start] = memoryview(part)[low - done : high - done]
            at, done = limit, done + len(part)
        if done < stop or (stop == self.nbytes and done != stop):
            raise FormatError(
                f"{self.path}: the array at byte {self.at} does not have the {self.nbytes} bytes that its shape needs; "
                "fetch it again"
            )
        return torch.frombuffer(result, dtype=torch.uint8) if result else torch.empty(0, dtype=torch.uint8)


class JoinedBytes:
    """Several payloads, one after the other."""

    def __init__(self, parts: Sequence[Payload]) -> None:
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(part.nbytes for part in parts)]

    @property
    def nbytes(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        first = min(bisect_right(self._starts, start) - 1, len(self._parts) - 1)
        if stop <= self._starts[first + 1]:
            return self._parts[first].read(start - self._starts[first], stop - self._starts[first])
        result = torch.empty(stop - start, dtype=torch.uint8)
        for part, begin in zip(self._parts, self._starts, strict=False):
            low, high = max(start, begin), min(stop, begin + part.nbytes)
            if low < high:
                result[low - start : high - start] = part.read(low - begin, high - begin)
        return result


@dataclass(frozen=True)
class StoredArray:
    """A NumPy array in a file, its bytes not read yet.

    Attributes:
        path: of the file.
        shape: in NumPy's and torch's order.
        dtype: as the file has it. Paddle writes bfloat16 as the uint16 of the same bits: see `load`.
        payload: its bytes; `prod(shape) * dtype.itemsize` of them.
        fortran_order: whether the first dimension is the one that runs fastest in the file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    payload: Payload
    fortran_order: bool = False

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes

    def load(self, *, bfloat16: bool = False) -> Tensor:
        """The whole array, (*shape): a view of the mapped file where it lies there aligned, else a copy.

        Writing to a view changes no file. A view keeps the map alive, also after the file is closed.

        Args:
            bfloat16: read uint16 as the bits of bfloat16.

        Raises:
            FormatError: when text of protocol 2 does not hold what its length promised.
        """
        return self.load_box(tuple(slice(0, size) for size in self.shape), bfloat16=bfloat16)

    def load_box(self, box: tuple[slice, ...], *, bfloat16: bool = False) -> Tensor:
        """A part of the array. Of the file only the rows (of dimension 0) that the box spans are touched.

        Args:
            box: a slice of step 1 for each dimension.
            bfloat16: read uint16 as the bits of bfloat16.

        Raises:
            FormatError: as `load`.
            IndexError: when the box does not lie in the array.
        """
        if len(box) != len(self.shape):
            raise IndexError(f"a box of {len(box)} dimensions in an array of {len(self.shape)}")
        ranges = [part.indices(size) for part, size in zip(box, self.shape, strict=True)]
        if any(step != 1 or stop < start for start, stop, step in ranges):
            raise IndexError(f"the box {box} does not lie in an array of shape {self.shape}")
        dtype = torch.bfloat16 if bfloat16 and self.dtype == torch.uint16 else self.dtype
        shape = tuple(stop - start for start, stop, _ in ranges)
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        if self.fortran_order:
            stored = self._read(self.shape[::-1], ranges[::-1], dtype)
            return stored.permute(*reversed(range(stored.dim())))
        return self._read(self.shape, ranges, dtype)

    def _read(self, shape: tuple[int, ...], ranges: list[tuple[int, int, int]], dtype: torch.dtype) -> Tensor:
        """The box of an array whose last dimension runs fastest."""
        if not shape:
            return self._typed(self.payload.read(0, self.nbytes), dtype).reshape(())
        (start, stop, _), inner = ranges[0], ranges[1:]
        row = prod(shape[1:]) * dtype.itemsize
        raw = self.payload.read(start * row, stop * row)
        aligned = raw.data_ptr() % dtype.itemsize == 0 and dtype != torch.bool
        values = raw.view(dtype) if aligned else raw.view(-1, dtype.itemsize)
        values = values.view(stop - start, *shape[1:], *values.shape[1:])
        for dim, (begin, end, _) in enumerate(inner, 1):
            values = values.narrow(dim, begin, end - begin)
        return values if aligned else self._typed(values, dtype).view(values.shape[:-1])

    @staticmethod
    def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
        """Bytes, wherever they lie, as a tensor of its own whose last dimension is `itemsize` times shorter."""
        if dtype == torch.bool:
            return raw != 0  # any other byte in a tensor of booleans is undefined behaviour
        return raw.clone(memory_format=torch.contiguous_format).view(dtype)
