"""Files packed by gzip or zstandard, read as a stream of bounded pieces."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from arriero.errors import DataError, require

# One zstandard block of at most 128 KiB can lie in 4 bytes: what a piece unpacks to stays below 128 MiB.
PIECE = 4096
# The largest window that `zstd --long=31` writes; the default of 128 MiB refuses such files.
WINDOW = 2**31


class ZstdFile(io.RawIOBase):
    """The content of a .zst file of one or more frames.

    The library's own stream reader takes a file that was cut off for a whole one, so the frames are followed here.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._zstandard = require("zstandard", "data")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._advance():
                return 0
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _advance(self) -> bool:
        """Unpack the next piece; False at the end of the file."""
        packed = b"" if self._frame is None or not self._frame.eof else bytes(self._frame.unused_data)
        packed = packed or self._raw.read(PIECE)
        if not packed:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("it ends in the middle")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
        self._ready = memoryview(self._frame.decompress(packed))
        return True


def open_packed(raw: BinaryIO, packing: str) -> io.RawIOBase:
    """The unpacked content of an open file."""
    if packing == "zst":
        return ZstdFile(raw)
    return cast(io.RawIOBase, gzip.GzipFile(fileobj=raw, mode="rb"))


@contextlib.contextmanager
def unpacking_errors(path: Path) -> Iterator[None]:
    """What the libraries raise over a broken file becomes one line.

    Raises:
        DataError: naming the file.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); fetch it again") from error
    except Exception as error:
        # zstandard is optional, so that its error can only be known by where it comes from.
        if type(error).__module__.partition(".")[0] in ("zstandard", "zstd"):
            raise DataError(f"{path}: cannot be unpacked ({error}); fetch it again") from error
        raise
