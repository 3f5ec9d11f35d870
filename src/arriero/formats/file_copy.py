"""Copying a run of bytes from one file to another, at any place of each, without them going through this process's tensors."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import numpy as np

# What a file system says that cannot do it, or not between these two files.
_UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOENT)
_DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux and FreeBSD
_BLOCK = max(4096, mmap.PAGESIZE)  # that places, lengths and addresses of direct reads and writes are multiples of
_CHUNK, _THREADS = 4 * 2**20, 4
_SHORTEST = 2**20  # run that is worth it


class FileCopier:
    """Copies runs of bytes; a context manager.

    The kernel copies them through its page cache. Where originals and copies are too large for that to be of use (more than
    half of the memory), it would only be swept, and each byte would be moved in memory twice: they go past it then, some
    chunks at a time, so that the disk reads and writes at once.

    Args:
        nbytes: that will be copied in all.
    """

    def __init__(self, nbytes: int) -> None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._direct = bool(_DIRECT) and 2 * nbytes > memory // 2
        self._pool = ThreadPoolExecutor(_THREADS)
        self._buffers = threading.local()

    def __enter__(self) -> FileCopier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def copy(self, source: Path, start: int, target: int, at: int, nbytes: int) -> bool:
        """Copy a run; False where that cannot be done between these two files, and the caller has to read and write.

        Args:
            source: the file to read.
            start: of the run in it, in bytes.
            target: descriptor of the file to write, which is as long already.
            at: where the run begins there.

        Raises:
            OSError: when a file cannot be read or written.
        """
        if self._direct and nbytes >= _SHORTEST:
            self._direct = _attempt(lambda: self._copy_direct(source, start, target, at, nbytes))
            if self._direct:
                return True
        return _attempt(lambda: _copy_by_kernel(source, start, target, at, nbytes))

    def _copy_direct(self, source: Path, start: int, target: int, at: int, nbytes: int) -> bool:
        first, last = -(-at // _BLOCK) * _BLOCK, (at + nbytes) // _BLOCK * _BLOCK
        # The blocks at both ends, which hold bytes of other runs too, and before the others: the cache is flushed by those.
        for begin, end in ((at, first), (last, at + nbytes)):
            if begin < end and not _copy_by_kernel(source, start + begin - at, target, begin, end - begin):
                return False
        reading = os.open(source, os.O_RDONLY | _DIRECT)
        try:
            writing = os.open(f"/proc/self/fd/{target}", os.O_WRONLY | _DIRECT)
            moves: list[Future[bool]] = []
            try:
                moves += [
                    self._pool.submit(
                        self._move, reading, start + begin - at, writing, begin, min(_CHUNK, last - begin)
                    )
                    for begin in range(first, last, _CHUNK)
                ]
                return all(move.result() for move in moves)
            finally:
                for move in moves:
                    move.cancel()
                wait(moves)  # for every one, also after a failure or an interrupt: they use the descriptors
                os.close(writing)
        finally:
            os.close(reading)

    def _move(self, reading: int, start: int, writing: int, at: int, nbytes: int) -> bool:
        """A chunk of whole blocks of the target; in the source they may begin within a block."""
        if not hasattr(self._buffers, "read"):  # memory maps begin at a page
            self._buffers.read, self._buffers.written = mmap.mmap(-1, _CHUNK + _BLOCK), mmap.mmap(-1, _CHUNK)
        shift = start % _BLOCK
        view = memoryview(self._buffers.read)[: -(-(shift + nbytes) // _BLOCK) * _BLOCK]
        if os.preadv(reading, [view], start - shift) < shift + nbytes:
            return False
        content = memoryview(self._buffers.written)[:nbytes]
        np.frombuffer(content, np.uint8)[:] = np.frombuffer(view, np.uint8, nbytes, shift)
        write_at(writing, content, at)
        return True


def write_at(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of some bytes at a place of a file."""
    while content:
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done


def _copy_by_kernel(source: Path, start: int, target: int, at: int, nbytes: int) -> bool:
    origin = os.open(source, os.O_RDONLY)
    try:
        while nbytes:
            done = os.copy_file_range(origin, target, nbytes, start, at)
            if done == 0:  # some file systems say so in place of an error
                return False
            start, at, nbytes = start + done, at + done, nbytes - done
    finally:
        os.close(origin)
    return True


def _attempt(copy: Callable[[], bool]) -> bool:
    try:
        return copy()
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return False
