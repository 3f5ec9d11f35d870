"""Writing `.pdparams` files that `paddle.load` reads: byte for byte what `paddle.save` writes, one tensor at a time.

It is a pickle of protocol 4, written opcode by opcode. Python's C pickler, which Paddle uses, remembers objects by
identity and cuts its output into frames; both are followed here, so that a test can compare whole files.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.growing_file import GrowingFile
from arriero.formats.narrowing import narrowed
from arriero.formats.paddle.pdparams_reader import SLICED_ARRAYS, STRUCTURED_NAMES
from arriero.formats.safe_tensors import LazyTensor

# NumPy 2 writes numpy._core here, which NumPy before 1.26 cannot read; all versions read this.
MULTIARRAY_MODULE = "numpy.core.multiarray"
# The reader's, and far above any name.
MAX_NAME_BYTES = 512

_FRAME_TARGET, _FRAME_MINIMUM, _BATCH = 64 * 1024, 4, 1000

# NumPy's code and order of bytes; bfloat16 is written as the uint16 of the same bits, as Paddle does.
_DTYPES = {
    torch.float64: ("f8", "<"),
    torch.float32: ("f4", "<"),
    torch.float16: ("f2", "<"),
    torch.bfloat16: ("u2", "<"),
    torch.int64: ("i8", "<"),
    torch.int32: ("i4", "<"),
    torch.int16: ("i2", "<"),
    torch.int8: ("i1", "|"),
    torch.uint8: ("u1", "|"),
    torch.bool: ("b1", "|"),
}

_PROTOCOL, _STOP = b"\x80\x04", b"."
_MARK, _MEMOIZE, _FRAME = b"(", b"\x94", b"\x95"
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_EMPTY_DICT, _SET_ITEM, _SET_ITEMS = b"}", b"s", b"u"
_EMPTY_TUPLE, _TUPLES, _TUPLE = b")", (b"\x85", b"\x86", b"\x87"), b"t"
_STACK_GLOBAL, _REDUCE, _BUILD = b"\x93", b"R", b"b"


def write_pdparams(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    structured_names: bool | Mapping[str, str] = True,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    writer: ChunkWriter | None = None,
) -> None:
    """Write a state dict; in memory are one tensor that has to be made, and some rows at most.

    Args:
        path: of the file, replaced if it is there; it is not written atomically: write into a staged folder.
        tensors: by name. One name or thousands, the order is kept.
        structured_names: write the table of the names that Paddle gives the tensors when they are loaded: the keys
            themselves, or those given here. False: a plain dict of NumPy arrays.
        dtype: to cast floating-point tensors to; None keeps each tensor's.
        progress: called with the bytes of tensors written and in all, after each tensor.
        writer: of the tensors of several files; None: one for this file.

    Raises:
        FormatError: for a name or a type that these files cannot hold, or a tensor that is not what it announced.
        OSError: when the file cannot be written.
    """
    kinds = {name: _kind(name, tensor.dtype, dtype) for name, tensor in tensors.items()}
    table = {name: name for name in tensors} if structured_names is True else structured_names or None
    if table is not None and table.keys() != tensors.keys():
        raise FormatError(f"{path}: the table of Paddle's names does not have the names of the tensors")
    total = sum(prod(tensor.shape) * kinds[name].itemsize for name, tensor in tensors.items())
    own = ChunkWriter(total) if writer is None else contextlib.nullcontext(writer)
    with Path(path).open("wb", buffering=0) as raw, own as chunks, chunks.filling():
        pickle = _Pickle(GrowingFile(raw.fileno(), chunks))
        advance = None if progress is None else partial(_advance, progress, total)
        pickle.dictionary(len(tensors) + (table is not None), _entries(pickle, tensors, kinds, table, advance))
        pickle.finish()


def _advance(progress: Callable[[int, int], None], total: int, done: int) -> None:
    progress(done, total)


def _entries(
    pickle: _Pickle,
    tensors: Mapping[str, Tensor | LazyTensor],
    kinds: Mapping[str, torch.dtype],
    table: Mapping[str, str] | None,
    progress: Callable[[int], None] | None,
) -> Iterator[None]:
    """Write a key and its value at each step."""
    done = 0
    for name, tensor in tensors.items():
        pickle.text(name, remembered=True)
        done += _write_array(pickle, name, tensor, kinds[name])
        if progress is not None:
            progress(done)
        yield
    if table is not None:
        pickle.text(STRUCTURED_NAMES)
        pickle.dictionary(len(table), _table_entries(pickle, [(name, table[name]) for name in tensors]))
        yield


def _table_entries(pickle: _Pickle, table: Sequence[tuple[str, str]]) -> Iterator[None]:
    for name, own_name in table:
        pickle.text(name, remembered=True)
        pickle.text(own_name, remembered=name is own_name)
        yield


def _kind(name: str, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME_BYTES):
        raise FormatError(f"the tensor name {name[:80]!r} is not short ASCII text; Paddle files hold no other here")
    if name in (STRUCTURED_NAMES, SLICED_ARRAYS):
        raise FormatError(f"no tensor can have the name {name!r}, which means something else in Paddle files")
    kind = wanted if wanted is not None and own.is_floating_point else own
    if kind not in _DTYPES:
        raise FormatError(
            f"the tensor {name!r} has the type {str(kind).removeprefix('torch.')}, which Paddle files do not hold; "
            "convert it with --dtype"
        )
    return kind


def _write_array(pickle: _Pickle, name: str, tensor: Tensor | LazyTensor, kind: torch.dtype) -> int:
    """One array, as `ndarray.__reduce__` says it is made; returns its number of bytes."""
    shape = tuple(tensor.shape)
    pickle.name(MULTIARRAY_MODULE, "_reconstruct")
    pickle.name("numpy", "ndarray")
    pickle.integers(0)
    pickle.close_tuple(1)
    pickle.payload(b"b")
    pickle.close_tuple(3)
    pickle.put(_REDUCE)
    pickle.remember()
    pickle.start(_MARK)
    pickle.integers(1)
    _write_shape(pickle, shape)
    _write_dtype(pickle, *_DTYPES[kind])
    pickle.start(_FALSE)  # rows, not columns, run through the bytes
    nbytes = prod(shape) * kind.itemsize
    pickle.tensor(name, tensor, nbytes, kind)
    pickle.put(_TUPLE)
    pickle.remember()
    pickle.put(_BUILD)
    return nbytes


def _write_shape(pickle: _Pickle, shape: tuple[int, ...]) -> None:
    if len(shape) > len(_TUPLES):
        pickle.start(_MARK)
    pickle.integers(*shape)
    pickle.close_tuple(len(shape))


def _write_dtype(pickle: _Pickle, code: str, order: str) -> None:
    if pickle.recall(("dtype", code)):
        return
    pickle.name("numpy", "dtype")
    pickle.text(code)
    pickle.start(_FALSE)
    pickle.start(_TRUE)
    pickle.close_tuple(3)
    pickle.put(_REDUCE)
    pickle.remember(("dtype", code))
    pickle.start(_MARK)
    pickle.integers(3)
    pickle.text(order, remembered=True)
    for _ in range(3):
        pickle.start(_NONE)
    pickle.integers(-1, -1, 0)
    pickle.put(_TUPLE)
    pickle.remember()
    pickle.put(_BUILD)


def _content(name: str, tensor: Tensor | LazyTensor, kind: torch.dtype) -> bytes:
    whole = tensor.load() if isinstance(tensor, LazyTensor) else tensor
    if tuple(whole.shape) != tuple(tensor.shape):
        raise FormatError(
            f"the tensor {name!r} was announced with the shape {tuple(tensor.shape)} and has {tuple(whole.shape)}"
        )
    if not whole.numel():
        return b""
    cast = narrowed(whole.detach().cpu(), kind, name)
    return cast.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Pickle:
    """Opcodes into a file, with the memo and the frames of Python's C pickler."""

    def __init__(self, file: GrowingFile) -> None:
        self._file = file
        self._frame = bytearray()
        self._memo: dict[object, int] = {}
        self._remembered = 0  # the values in the reader's memo, most of them never referred to
        file.write(_PROTOCOL)

    def finish(self) -> None:
        self.put(_STOP)
        self._commit()

    def put(self, opcode: bytes) -> None:
        self._frame += opcode

    def start(self, opcode: bytes) -> None:
        """Write the first opcode of a value: only before one may a frame end."""
        if len(self._frame) >= _FRAME_TARGET:
            self._commit()
        self._frame += opcode

    def remember(self, key: object = None) -> None:
        """Put the value just written into the memo; under a key if it is referred to later."""
        if key is not None:
            self._memo[key] = self._remembered
        self._remembered += 1
        self.put(_MEMOIZE)

    def recall(self, key: object) -> bool:
        """Refer to a remembered value, if there is one."""
        index = self._memo.get(key)
        if index is not None:
            self.start(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
        return index is not None

    def text(self, value: str, *, remembered: bool = False) -> None:
        """Text; `remembered`: which Python has as one object wherever it is written so."""
        key = ("text", value) if remembered else None
        if key is None or not self.recall(key):
            raw = value.encode()
            self.start((b"\x8c" + bytes([len(raw)]) if len(raw) < 256 else b"X" + struct.pack("<I", len(raw))) + raw)
            self.remember(key)

    def name(self, module: str, name: str) -> None:
        key = ("name", module, name)
        if not self.recall(key):
            self.text(module, remembered=True)
            self.text(name)
            self.put(_STACK_GLOBAL)
            self.remember(key)

    def integers(self, *values: int) -> None:
        for value in values:
            if 0 <= value < 2**8:
                self.start(b"K" + struct.pack("<B", value))
            elif 0 <= value < 2**16:
                self.start(b"M" + struct.pack("<H", value))
            elif -(2**31) <= value < 2**31:
                self.start(b"J" + struct.pack("<i", value))
            else:
                raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                self.start(b"\x8a" + bytes([len(raw)]) + raw)

    def close_tuple(self, length: int) -> None:
        """Make a tuple of the last values; before more than three of them stands a mark."""
        if length:
            self.put(_TUPLES[length - 1] if length <= len(_TUPLES) else _TUPLE)
            self.remember()
        else:
            self.start(_EMPTY_TUPLE)

    def tensor(self, name: str, tensor: Tensor | LazyTensor, nbytes: int, kind: torch.dtype) -> None:
        """The bytes of a tensor: in the frame if they are few, else outside it."""
        if nbytes < _FRAME_TARGET:
            self.payload(_content(name, tensor, kind))
            return
        self._commit()
        self._file.write(_length(nbytes))
        self._file.put(f"the tensor {name!r}", tensor, nbytes, dtype=kind)
        self.remember()

    def payload(self, content: bytes) -> None:
        """Bytes within the frame. Python has one object for each of at most one byte."""
        key = ("bytes", content) if len(content) < 2 else None
        if key is not None and self.recall(key):
            return
        self.start(_length(len(content)))
        self._frame += content
        self.remember(key)

    def dictionary(self, length: int, entries: Iterator[None]) -> None:
        """A dict of so many entries; each step of `entries` writes a key and its value."""
        self.start(_EMPTY_DICT)
        self.remember()
        if length == 1:
            next(entries)
            self.put(_SET_ITEM)
        elif length:
            # Batches as the C pickler makes them: after a last full one comes an empty one.
            for begin in range(0, length + 1, _BATCH):
                self.put(_MARK)
                for _ in range(min(_BATCH, length - begin)):
                    next(entries)
                self.put(_SET_ITEMS)

    def _commit(self) -> None:
        if len(self._frame) >= _FRAME_MINIMUM:
            self._file.write(_FRAME + struct.pack("<Q", len(self._frame)))
        self._file.write(bytes(self._frame))
        self._frame.clear()


def _length(nbytes: int) -> bytes:
    """What goes before so many bytes."""
    if nbytes < 2**8:
        return b"C" + struct.pack("<B", nbytes)
    return b"B" + struct.pack("<I", nbytes) if nbytes < 2**32 else b"\x8e" + struct.pack("<Q", nbytes)
