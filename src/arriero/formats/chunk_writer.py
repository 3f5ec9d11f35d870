"""Filling new files with tensors: several threads read chunks of them, put their numbers in order, and write them."""

from __future__ import annotations

import contextlib
import mmap
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.file_chunks import (
    BLOCK,
    OpenFile,
    copy_piece,
    direct_is_better,
    open_source,
    open_target,
    read_ahead,
    read_into,
    read_piece,
    reserve,
    thread_memory,
    write_piece,
)
from arriero.formats.narrowing import narrowed
from arriero.formats.rearranged import Rearranged, in_order
from arriero.formats.safe_tensors import FileTensor, LazyTensor

Pack = Callable[[Tensor], NDArray[np.uint8]]

_CHUNK, _THREADS, _READERS = 4 * 2**20, 6, 3
_IN_WORK = 2**28  # bytes of tensors that are read past the cache, or wait to be written; one tensor may be more


@dataclass
class Piece:
    """A run of bytes that was written.

    Attributes:
        nbytes: how many.
        checksum: their CRC-32, if it was asked for.
    """

    nbytes: int
    checksum: int


@dataclass
class _Whole:
    """A tensor's numbers, the place in a file that they were read from, and how many that are in the writing need them."""

    tensor: Tensor
    place: tuple[Path, int] | None = None
    buffer: mmap.mmap | None = None
    users: int = 0


@dataclass
class _Job:
    """A tensor in the writing: its chunks, and what is held until they are written."""

    nbytes: int
    whole: _Whole | None = None
    rows: _Rows | None = None
    pieces: list[Future[Piece]] = field(default_factory=list)


class ChunkWriter:
    """Writes tensors at places of files while the next are read; a context manager.

    A tensor that lies in a file as it is to be written is copied from file to file; one that lies there in another order or
    type (`Rearranged`) is read or mapped, one that has to be computed is made, one at a time. Where originals and copies are
    too large for the kernel's cache to be of use, reads and writes go past it.

    Args:
        nbytes: that will be written in all.
    """

    def __init__(self, nbytes: int) -> None:
        self._direct = direct_is_better(2 * nbytes)
        self._sources: dict[Path, OpenFile] = {}
        self._targets: dict[int, OpenFile] = {}
        self._jobs: deque[_Job] = deque()
        self._reads: list[Future[int]] = []
        self._spare: list[mmap.mmap] = []
        self._pool = ThreadPoolExecutor(_THREADS, "write")
        self._readers = ThreadPoolExecutor(_READERS, "read")

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._pool.shutdown(cancel_futures=True)  # waits for what is at work: it uses the descriptors
            self._readers.shutdown(cancel_futures=True)
            self._close()

    def put(
        self,
        target: int,
        at: int,
        name: str,
        value: Tensor | LazyTensor,
        nbytes: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        pack: Pack | None = None,
        checksum: bool = False,
    ) -> list[Future[Piece]]:
        """Have a tensor written; it may not be when this returns: `settle` waits for it.

        Args:
            target: descriptor of the file, open for writing.
            at: where the tensor's first byte is to lie.
            name: of the tensor, for messages.
            nbytes: that it takes there; None: as many as its numbers in `dtype`.
            dtype: to cast to; None: as it is.
            pack: makes the bytes of some of its rows, as many of each row, in place of a cast; called by several threads.
            checksum: have the checksums of the pieces computed.

        Returns:
            What becomes the pieces that it is written in, in their order.

        Raises:
            OSError: when this or an earlier tensor cannot be read or written.
            FormatError: when it is not of the shape that was announced, or `pack` refuses an earlier one, or
                the cast makes a number infinite.
        """
        kind = dtype or value.dtype
        if nbytes is None:
            nbytes = prod(value.shape) * kind.itemsize
        if not nbytes:
            return []
        opened = self._targets.get(target)
        if opened is None:
            opened = self._targets[target] = open_target(target, direct=self._direct)
        if isinstance(value, FileTensor) and pack is None and value.dtype == kind:
            self._wait(nbytes)
            job = _Job(nbytes)
            self._copy(job, value, opened, at, checksum)
        else:
            base = value.base if isinstance(value, Rearranged) else value
            whole = self._load(base)
            shape = tuple(base.shape)
            if tuple(whole.tensor.shape) != shape:
                raise FormatError(f"{name} was announced with the shape {shape} and has {tuple(whole.tensor.shape)}")
            rows = value.view(whole.tensor) if isinstance(value, Rearranged) else whole.tensor
            rows = rows.detach().reshape(1) if rows.dim() == 0 else rows.detach()
            whole.users += 1
            made = _Rows(rows, nbytes // rows.shape[0], pack or _Cast(kind, name))
            job = _Job(nbytes, whole, made)
            self._make(job, made, opened, at, checksum)
        return list(job.pieces)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """A block within which a file is open: after it, everything is written, or at an error nothing is at work any more."""
        try:
            yield
            self.settle()
        except BaseException:
            self.discard()
            raise

    def settle(self) -> None:
        """Wait until everything is written (to the kernel), and nothing that was given is kept.

        Raises:
            OSError: when something cannot be read or written.
            FormatError: of a tensor that cannot be packed.
        """
        while self._jobs:
            self._finish()
        self._close()

    def discard(self) -> None:
        """Drop what is not written yet; when this returns, nothing is at work any more."""
        at_work: list[Future[Any]] = [*self._reads, *(piece for job in self._jobs for piece in job.pieces)]
        for one in at_work:
            one.cancel()
        wait(at_work)
        self._jobs.clear()
        self._close()

    def _copy(self, job: _Job, value: FileTensor, target: OpenFile, at: int, checksum: bool) -> None:
        source = self._source(value.path)
        ranges = self._ranges(target, at, job.nbytes, _CHUNK)
        if target.direct is None:
            read_ahead(source, value.offset, job.nbytes)
        self._jobs.append(job)
        for begin, end in ranges:
            job.pieces.append(
                self._pool.submit(_copied, source, value.offset, begin, end, target, at, checksum=checksum)
            )

    def _make(self, job: _Job, make: _Rows, target: OpenFile, at: int, checksum: bool) -> None:
        step = max(1, _CHUNK // make.row_bytes) * make.row_bytes
        ranges = self._ranges(target, at, job.nbytes, step)
        self._jobs.append(job)
        for begin, end in ranges:
            job.pieces.append(self._pool.submit(_made, make, begin, end, target, at, checksum=checksum))

    def _ranges(self, target: OpenFile, at: int, nbytes: int, step: int) -> list[tuple[int, int]]:
        """The runs of a tensor's bytes that are written each at once: past the cache whole blocks of the file."""
        reserve(target.plain, at, nbytes)  # a full disk is found before it is written
        ends = {0, *range(step, nbytes, step), nbytes}
        if target.direct is not None:
            first, last = -at % BLOCK, nbytes - (at + nbytes) % BLOCK
            ends = {0, nbytes} | ({*range(first, last, _CHUNK), last} if first < last else set())
        return list(pairwise(sorted(ends)))

    def _load(self, base: Tensor | LazyTensor) -> _Whole:
        nbytes = prod(base.shape) * base.dtype.itemsize
        if not isinstance(base, FileTensor):
            self._wait(_IN_WORK)  # what is computed takes memory: one at a time
            made = base.load() if isinstance(base, LazyTensor) else base
            return _Whole(made.to("cpu"))
        place = base.path, base.offset
        latest = self._jobs[-1].whole if self._jobs else None
        if latest is not None and latest.place == place:  # another part of the same
            return latest
        self._wait(nbytes)
        source = self._source(base.path)
        if source.direct is None or base.offset % base.dtype.itemsize:
            read_ahead(source, base.offset, nbytes)
            return _Whole(base.load(), place)
        buffer = self._take(nbytes + 2 * BLOCK)
        shift, view = base.offset % BLOCK, memoryview(buffer)
        starts = range(0, shift + nbytes, _CHUNK)
        self._reads = [
            self._readers.submit(
                read_into, source, base.offset - shift + start, view[start:], min(_CHUNK, shift + nbytes - start)
            )
            for start in starts
        ]
        wait(self._reads)
        for read in self._reads:
            read.result()
        content = np.frombuffer(buffer, np.uint8, nbytes, shift)
        return _Whole(torch.from_numpy(content).view(base.dtype).view(base.shape), place, buffer)

    def _take(self, length: int) -> mmap.mmap:
        """Memory from a page on; used again, since the kernel clears new pages."""
        fitting = [buffer for buffer in self._spare if len(buffer) >= length]
        if fitting:
            found = min(fitting, key=len)
            self._spare.remove(found)
            return found
        self._spare.clear()
        return mmap.mmap(-1, -(-length // BLOCK) * BLOCK)

    def _wait(self, nbytes: int) -> None:
        """Finish tensors until there is room for so many bytes of another one."""
        while self._jobs and sum(job.nbytes for job in self._jobs) + nbytes > _IN_WORK:
            self._finish()

    def _finish(self) -> None:
        job = self._jobs[0]
        wait(job.pieces)
        for piece in job.pieces:
            piece.result()
        self._jobs.popleft()
        if job.rows is not None:
            job.rows.release()  # a thread may keep its last call a moment longer than it works at it
        if job.whole is not None:
            job.whole.users -= 1
            if job.whole.buffer is not None and not job.whole.users:
                self._spare.append(job.whole.buffer)

    def _source(self, path: Path) -> OpenFile:
        found = self._sources.get(path)
        if found is None:
            found = self._sources[path] = open_source(path, direct=self._direct)
        return found

    def _close(self) -> None:
        for opened in (*self._sources.values(), *self._targets.values()):
            opened.close()
        self._sources.clear()
        self._targets.clear()


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype
    name: str

    def __call__(self, rows: Tensor) -> NDArray[np.uint8]:
        ordered = in_order(rows, partial(thread_memory, "in order"))
        made: NDArray[np.uint8] = narrowed(ordered, self.dtype, self.name).view(-1).view(torch.uint8).numpy()
        return made


@dataclass
class _Rows:
    """A tensor whose bytes are made some rows at a time."""

    rows: Tensor | None
    row_bytes: int
    pack: Pack

    def bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        assert self.rows is not None
        first, last = begin // self.row_bytes, -(-end // self.row_bytes)
        made = self.pack(self.rows[first:last]).reshape(-1)
        return made[begin - first * self.row_bytes : end - first * self.row_bytes]

    def release(self) -> None:
        """The tensor is not needed any more."""
        self.rows = None


def _made(make: _Rows, begin: int, end: int, target: OpenFile, at: int, *, checksum: bool) -> Piece:
    content = make.bytes(begin, end)
    write_piece(target, at + begin, content)
    return Piece(end - begin, zlib.crc32(content.data) if checksum else 0)


def _copied(source: OpenFile, start: int, begin: int, end: int, target: OpenFile, at: int, *, checksum: bool) -> Piece:
    if not checksum:
        copy_piece(source, start + begin, target, at + begin, end - begin)
        return Piece(end - begin, 0)
    content = read_piece(source, start + begin, end - begin)
    write_piece(target, at + begin, content)
    return Piece(end - begin, zlib.crc32(content.data))
