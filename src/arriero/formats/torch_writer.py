"""Writing the files of torch.save, a tensor at a time.

torch.save needs every tensor in memory at once. The archive is simple enough to be written as it goes: the pickle, which
only names and shapes go into, then each storage, aligned to 64 bytes so that the file can be mapped.
"""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.checksum import checksum
from arriero.formats.chunk_writer import ChunkWriter, Piece
from arriero.formats.growing_file import GrowingFile
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.staging import write_error
from arriero.formats.torch_pickle import ORDERED_DICT, REBUILD_TENSOR, STORAGES

ALIGNMENT = 64  # of every storage in the file, as torch.save has it
_FOLDER = "archive"  # the name is of no meaning; torch.save takes the file's
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_PADDING_FIELD = 0x4246  # "FB", the id that torch.save gives to its padding
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


class TorchFileWriter:
    """A file of torch.save in the making; a context manager. Not atomic: see `arriero.formats.staging`.

    Args:
        path: of the file; replaced if it exists.
        layout: dtype and shape of every tensor, by name, in the order in which they are written.
        shared: name -> the name in `layout` whose storage it shares, for a tied head.
        writer: of the tensors; the file is complete after `close`, within the writer's context.

    Raises:
        FormatError: for a dtype that is no floating-point one, a tensor that is not as announced, or a failed write.
    """

    def __init__(
        self,
        path: str | Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        writer: ChunkWriter,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self._waiting: Iterator[tuple[int, str]] = iter(enumerate(layout))
        self._chunks = writer
        self._stored: list[tuple[zipfile.ZipInfo, bool, list[Future[Piece]]]] = []
        pickle = _pickle(layout, shared or {})
        try:
            self._raw = self.path.open("wb", buffering=0)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._file = GrowingFile(self._raw.fileno(), writer)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        try:
            self._record("data.pkl", pickle)
            self._record("byteorder", b"little")
        except OSError as error:
            self._abandon()
            raise write_error(self.path, error) from error

    def write(self, name: str, tensor: Tensor | LazyTensor) -> None:
        """Append the next tensor of the layout, cast to what that says; see `ChunkWriter.put`."""
        number, expected = next(self._waiting, (0, None))
        if name != expected:
            raise FormatError(f"{self.path}: {name} is written where {expected} was announced")
        dtype, shape = self.layout[name]
        if tuple(tensor.shape) != shape:
            raise FormatError(f"{self.path}: {name} is {list(tensor.shape)}, {list(shape)} was announced")
        entry, wide = self._entry(f"data/{number}", prod(shape) * dtype.itemsize)
        entry.header_offset = self._file.tell()
        try:
            self._file.seek(entry.header_offset + len(entry.FileHeader(wide)))
            pieces = self._file.put(f"{self.path}: {name}", tensor, entry.file_size, dtype=dtype, checksum=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._archive.start_dir = self._file.tell()  # where the next record begins
        self._stored.append((entry, wide, pieces))

    def _entry(self, name: str, nbytes: int) -> tuple[zipfile.ZipInfo, bool]:
        """A record that begins here, its content aligned by padding; and whether it has the field for sizes over 4 GB."""
        entry = zipfile.ZipInfo(f"{_FOLDER}/{name}")
        entry.file_size = entry.compress_size = nbytes
        entry.CRC = 0  # until it is known
        # zipfile adds the field itself.
        wide = nbytes * 1.05 > zipfile.ZIP64_LIMIT
        begin = self._file.tell() + _LOCAL_HEADER_BYTES + len(entry.filename) + (_ZIP64_FIELD_BYTES if wide else 0) + 4
        padding = -begin % ALIGNMENT
        entry.extra = struct.pack("<2H", _PADDING_FIELD, padding) + b"Z" * padding
        return entry, wide

    def _record(self, name: str, content: bytes) -> None:
        entry, wide = self._entry(name, len(content))
        with self._archive.open(entry, "w", force_zip64=wide) as record:
            record.write(content)
        # Readers need the padding where the data is, not in the directory too.
        entry.extra = b""

    def close(self) -> None:
        """Write the headers of the tensors and the archive's directory, once every tensor is there."""
        missing = next(self._waiting, None)
        if missing is not None:
            raise FormatError(f"{self.path}: {missing[1]} was announced and not written")
        try:
            self._chunks.settle()
            end = self._file.tell()
            for entry, wide, pieces in self._stored:
                entry.CRC = checksum(piece.result() for piece in pieces)
                self._file.seek(entry.header_offset)
                self._file.write(entry.FileHeader(wide))
                entry.extra = b""
                self._archive.filelist.append(entry)
                self._archive.NameToInfo[entry.filename] = entry
            self._file.seek(end)
            self._record("version", b"3\n")
            self._archive.close()
            self._file.close()
            self._raw.close()
        except OSError as error:
            raise write_error(self.path, error) from error

    def __enter__(self) -> TorchFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        except FormatError:
            self._abandon()
            raise
        if error is not None:
            self._abandon()

    def _abandon(self) -> None:
        self._chunks.discard()
        for file in (self._archive, self._file, self._raw):
            with contextlib.suppress(OSError, ValueError):  # that the disk is full is known already
                file.close()
        self.path.unlink(missing_ok=True)


def write_torch_file(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a state dict that torch.load(..., weights_only=True, mmap=True) reads; one tensor at a time is in memory.

    Args:
        progress: told the bytes written and the bytes in all after each tensor.

    Raises:
        FormatError: for a dtype that is no floating-point one, or a failed write (a full disk, say); no file remains.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    total, done = sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values()), 0
    with ChunkWriter(total) as writer, writer.filling(), TorchFileWriter(path, layout, writer) as file:
        for name, value in tensors.items():
            file.write(name, value)
            done += prod(value.shape) * value.dtype.itemsize
            if progress is not None:
                progress(done, total)


def _pickle(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shared: Mapping[str, str]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors, with the same instructions that torch.save writes, memo aside."""
    keys = {name: str(number) for number, name in enumerate(layout)}
    items = b"".join(
        _text(name) + _tensor(keys[stored], *layout[stored])
        for name, stored in ({name: name for name in layout} | dict(shared)).items()
    )
    return b"\x80\x02}(" + items + b"u."


def _tensor(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    if dtype not in _STORAGE_NAMES or not dtype.is_floating_point:
        raise FormatError(f"{dtype} is not written to a file of torch.save; only floating-point weights are")
    strides = tuple(prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    storage = _text("storage") + _name(f"torch {_STORAGE_NAMES[dtype]}") + _text(key) + _text("cpu")
    storage = b"((" + storage + _number(prod(shape)) + b"tQ"
    hooks = _name(ORDERED_DICT) + b")R"
    return _name(REBUILD_TENSOR) + storage + _number(0) + _tuple(shape) + _tuple(strides) + b"\x89" + hooks + b"tR"


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _name(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode("ascii") + b"\n"


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
