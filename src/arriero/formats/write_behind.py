"""Writing a file while what comes next in it is made.

A conversion reads, reorders and writes; one after the other, disk and processor wait for each other. Here a thread writes
what was made, and the kernel is told to begin with the disk at once and not only when the file is complete.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from arriero.formats.file_copy import write_at
from arriero.formats.safe_tensors import FileTensor, LazyTensor

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PIECE = 8 * 2**20  # bytes that are written at once
_WAITING = 2 * _PIECE  # bytes that may wait or be in the writing
_SMALL = 2**16  # bytes that are rather copied than kept with the tensor that they are of
_WRITE_BACK = 32 * 2**20  # bytes after which the disk is set to work
_AHEAD, _MOST_AHEAD = 2**20, 256 * 2**20  # bytes to read at once (Linux leaves out what goes far beyond), and in all
_ADVISE = getattr(os, "posix_fadvise", None)  # not on macOS


class WriteBehind(io.RawIOBase):
    """A file whose large pieces are written by a thread, in the order of the calls, 16 MiB of them at most at a time.

    What is given to `write` is not copied: it must not change before `settle` or `close`, and is kept until it is written.
    An error of the thread comes up in the next call; what was to be written after it is dropped. Python's signal handlers
    run on the main thread as ever: on an interrupt, `discard` ends the thread after the piece that it is at.

    Args:
        descriptor: of the file, open for writing; the caller closes it, after this.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._at, self._begun = descriptor, 0, 0
        self._pieces: deque[tuple[int, memoryview]] = deque()
        self._waiting = 0
        self._error: BaseException | None = None
        self._ends = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, counted from the start of the file.

        Raises:
            OSError: when counted from elsewhere.
        """
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("only seeks from the start of the file")
        self._at = offset
        return offset

    def write(self, content: ReadableBuffer) -> int:
        """Have bytes written here; returns how many, which is always all of them.

        Raises:
            OSError: when these or earlier ones cannot be written.
            ValueError: after `discard`.
        """
        if self._ends:
            raise ValueError("write to a discarded file")
        view = memoryview(content).cast("B")
        if view.nbytes <= _SMALL:
            if self._thread is None:
                write_at(self._descriptor, view, self._at)
            else:
                self._give(self._at, memoryview(bytes(view)))
        else:
            for start in range(0, view.nbytes, _PIECE):
                self._give(self._at + start, view[start : start + _PIECE])
        self._at += view.nbytes
        return view.nbytes

    def settle(self) -> None:
        """Wait until everything is written (to the kernel), and nothing that was given is kept.

        Raises:
            OSError: when something could not be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._error is not None)
            self._raise()

    def flush(self) -> None:
        if not self.closed:
            self.settle()

    def close(self) -> None:
        """Write what waits, and end the thread.

        Raises:
            OSError: when something could not be written.
        """
        try:
            super().close()  # which flushes
        finally:
            self.discard()

    def discard(self) -> None:
        """End the thread; what waits is not written."""
        with self._changed:
            self._ends = True
            self._pieces.clear()
            self._waiting = 0
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error = None  # whoever discards knows of one

    def _give(self, at: int, piece: memoryview) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="write behind", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting + piece.nbytes <= _WAITING or self._error is not None)
            self._raise()
            self._pieces.append((at, piece))
            self._waiting += piece.nbytes
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._pieces) or self._ends)
                if self._ends:
                    return
                at, piece = self._pieces.popleft()
            size = piece.nbytes
            try:
                write_at(self._descriptor, piece, at)
                self._write_back(at + size)
            except BaseException as error:  # whatever it is, the caller has to know
                with self._changed:
                    self._error = error
                    self._pieces.clear()
                    self._changed.notify_all()
                return
            del piece  # and with it, the last reference to a tensor
            with self._changed:
                self._waiting = max(0, self._waiting - size)
                self._changed.notify_all()

    def _write_back(self, end: int) -> None:
        """Set the disk to work on what was written so far.

        Linux begins to write the changed pages of a range that it is told to drop, and does not wait for them; pages that are
        being written stay in its cache.
        """
        if _ADVISE is not None and end - self._begun >= _WRITE_BACK:
            _ADVISE(self._descriptor, self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end


def read_ahead(tensor: Tensor | LazyTensor | None) -> None:
    """Have the kernel read a tensor that lies in a file just so, while something else is done; any other: nothing happens."""
    if _ADVISE is None or not isinstance(tensor, FileTensor):
        return
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY)
    except OSError:
        return  # whoever reads it will say so
    try:
        end = tensor.offset + min(prod(tensor.shape) * tensor.dtype.itemsize, _MOST_AHEAD)
        for start in range(tensor.offset, end, _AHEAD):
            _ADVISE(descriptor, start, min(_AHEAD, end - start), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
