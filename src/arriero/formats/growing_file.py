"""A file that grows by small pieces and by tensors, which are still being written when the next piece comes."""

from __future__ import annotations

import io
import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arriero.formats.chunk_writer import ChunkWriter, Piece
from arriero.formats.file_chunks import write_at
from arriero.formats.safe_tensors import LazyTensor

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class GrowingFile(io.RawIOBase):
    """A file to write from its start on, without a buffer of its own.

    Args:
        descriptor: of the file, open for writing; the caller closes it, after the writer's `settle`.
        writer: of the tensors.
    """

    def __init__(self, descriptor: int, writer: ChunkWriter) -> None:
        super().__init__()
        self._descriptor, self._writer, self._at = descriptor, writer, 0

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
        """Write bytes here; returns how many, which is always all of them.

        Raises:
            OSError: when they cannot be written.
        """
        view = memoryview(content).cast("B")
        write_at(self._descriptor, view, self._at)
        self._at += view.nbytes
        return view.nbytes

    def put(self, name: str, value: Tensor | LazyTensor, nbytes: int, **how: Any) -> list[Future[Piece]]:
        """Have a tensor written here, and go on behind it; see `ChunkWriter.put`."""
        pieces = self._writer.put(self._descriptor, self._at, name, value, nbytes, **how)
        self._at += nbytes
        return pieces
