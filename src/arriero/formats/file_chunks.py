"""Reading and writing pieces of files at any place of each, through the page cache of the kernel or past it."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# What a file system says that cannot do it, or not between these two files.
_UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOENT)
_DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux and FreeBSD
_ADVISE = getattr(os, "posix_fadvise", None)  # not on macOS
BLOCK = max(4096, mmap.PAGESIZE)  # that places, lengths and addresses of direct reads and writes are multiples of
_buffers = threading.local()


def direct_is_better(nbytes: int) -> bool:
    """Whether so much reading and writing does better without the kernel's cache.

    Where it is more than half of the memory, the cache would only be swept, and each byte moved in memory once more.
    """
    return bool(_DIRECT) and nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@dataclass
class OpenFile:
    """A file that pieces are read from or written to.

    Attributes:
        plain: the descriptor of the file.
        direct: one past the cache; None where that is not wanted, or cannot be.
        owned: whether `close` closes the plain one too.
        copies: whether the kernel has not refused to copy into it.
    """

    plain: int
    direct: int | None
    owned: bool
    copies: bool = field(default=hasattr(os, "copy_file_range"))

    def close(self) -> None:
        for descriptor in (self.direct, self.plain if self.owned else None):
            if descriptor is not None:
                os.close(descriptor)


def open_source(path: Path, *, direct: bool) -> OpenFile:
    """Open a file to read.

    Raises:
        OSError: when it cannot be opened.
    """
    plain = os.open(path, os.O_RDONLY)
    return OpenFile(plain, _directly(path, os.O_RDONLY) if direct else None, owned=True)


def open_target(descriptor: int, *, direct: bool) -> OpenFile:
    """A file that is open for writing, whose descriptor stays the caller's."""
    path = Path(f"/proc/self/fd/{descriptor}")
    return OpenFile(descriptor, _directly(path, os.O_WRONLY) if direct else None, owned=False)


def _directly(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return None


def reserve(descriptor: int, at: int, length: int) -> None:
    """Have the file be so long, and space for it on the disk.

    Raises:
        OSError: when there is not enough.
    """
    try:
        os.posix_fallocate(descriptor, at, length)
    except (OSError, AttributeError) as error:  # a file system that cannot reserve space, or macOS
        if isinstance(error, OSError) and error.errno not in _UNABLE:
            raise
        os.ftruncate(descriptor, max(os.fstat(descriptor).st_size, at + length))


def write_at(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of some bytes at a place of a file."""
    while content:
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done


def read_into(source: OpenFile, start: int, buffer: memoryview, length: int) -> int:
    """Read some bytes into a buffer; returns where in it they begin, which past the cache is where they begin in their block.

    Args:
        buffer: begins at a page, and is longer than they are by two blocks.

    Raises:
        OSError: when they cannot be read.
    """
    shift = start % BLOCK if source.direct is not None else 0
    end = -(-(shift + length) // BLOCK) * BLOCK if shift or source.direct is not None else length
    descriptor, done = source.plain if source.direct is None else source.direct, 0
    while done < shift + length:
        some = os.preadv(descriptor, [buffer[done:end]], start - shift + done)
        if not some:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        done += some
    return shift


def read_piece(source: OpenFile, start: int, length: int) -> NDArray[np.uint8]:
    """Bytes of a file, in a buffer that this thread uses again for the next.

    Raises:
        OSError: when they cannot be read.
    """
    buffer = thread_memory("read", length + 2 * BLOCK)
    shift = read_into(source, start, buffer, length)
    return np.frombuffer(buffer, np.uint8, length, shift)


def write_piece(target: OpenFile, at: int, content: NDArray[np.uint8]) -> None:
    """Write bytes; whole blocks go past the cache, if the file is open so.

    Raises:
        OSError: when they cannot be written.
    """
    if target.direct is None or at % BLOCK or content.nbytes % BLOCK:
        write_at(target.plain, content.data, at)
        if content.nbytes >= BLOCK:
            write_back(target.plain, at, content.nbytes)
        return
    if content.ctypes.data % BLOCK:
        aligned = np.frombuffer(thread_memory("written", content.nbytes), np.uint8, content.nbytes)
        aligned[:] = content
        content = aligned
    write_at(target.direct, content.data, at)


def copy_piece(source: OpenFile, start: int, target: OpenFile, at: int, length: int) -> None:
    """Copy bytes from file to file, by the kernel through its cache, or where it cannot, or past the cache, by hand.

    Raises:
        OSError: when they cannot be read or written.
    """
    if target.direct is None and target.copies:
        try:
            while length:
                done = os.copy_file_range(source.plain, target.plain, length, start, at)
                if done == 0:  # some file systems say so in place of an error
                    break
                start, at, length = start + done, at + done, length - done
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            target.copies = False
        if not length:
            return
    write_piece(target, at, read_piece(source, start, length))


def write_back(descriptor: int, at: int, length: int) -> None:
    """Set the disk to work on what was written to the cache.

    Linux begins to write the changed pages of a range that it is told to drop, and does not wait for them; pages that are
    being written stay in its cache.
    """
    if _ADVISE is not None:
        _ADVISE(descriptor, at, length, os.POSIX_FADV_DONTNEED)


def read_ahead(source: OpenFile, start: int, length: int) -> None:
    """Have the kernel read into its cache, while something else is done."""
    if _ADVISE is not None:
        for begin in range(start, start + min(length, _MOST_AHEAD), _AHEAD):
            _ADVISE(source.plain, begin, min(_AHEAD, start + length - begin), os.POSIX_FADV_WILLNEED)


_AHEAD, _MOST_AHEAD = 2**20, 2**28  # bytes to read at once (Linux leaves out what goes far beyond), and in all


def thread_memory(name: str, length: int) -> memoryview:
    """Memory of this thread, from the beginning of a page on, which it gets again when it asks by the same name.

    Of what each chunk would allocate and free anew, the allocator keeps many times as much.
    """
    found: mmap.mmap | None = getattr(_buffers, name, None)
    if found is None or len(found) < length:
        found = mmap.mmap(-1, -(-length // BLOCK) * BLOCK)
        setattr(_buffers, name, found)
    return memoryview(found)
