"""The pickle in a `.pdparams` file, read as data: the few opcodes and names that Paddle's weight files consist of.

It knows the shapes that `paddle.save` leaves (dicts, lists, tuples, numbers, text, NumPy arrays). An array's bytes are not
taken into memory; where they lie is noted.

Shapes: `paddle/framework/io.py` of Paddle 3.3.1 (protocols 2, 3 and 4) and `ndarray.__reduce_ex__` of NumPy 1 and 2
(protocol 5 too).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch

from arriero.errors import FormatError
from arriero.formats.paddle.stored_array import FileBytes, Latin1Bytes, Payload, StoredArray, is_shape
from arriero.formats.pickle_machine import PROTOCOL_4, U8, U32, U64, Actions, PickleMachine

MAX_TEXT_BYTES = 1024

# NumPy's codes; Paddle has no others. Objects, text, times and records are none of numbers.
DTYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "u1": torch.uint8,
    "i2": torch.int16,
    "u2": torch.uint16,
    "i4": torch.int32,
    "u4": torch.uint32,
    "i8": torch.int64,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}


class Global(Enum):
    """What a file may name; nothing of it is imported."""

    RECONSTRUCT = "an empty array"
    FROM_BUFFER = "an array"
    NDARRAY = "the class of arrays"
    DTYPE = "a data type"
    SCALAR = "a number of NumPy"
    ENCODE = "bytes from text"
    BYTES = "no bytes"
    TUPLE = "a tensor with its name"
    ORDERED_DICT = "a dict"


# NumPy 2 says numpy._core, NumPy 1 numpy.core; protocol 2 says __builtin__ for builtins.
GLOBALS = {
    "numpy.core.multiarray _reconstruct": Global.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": Global.RECONSTRUCT,
    "numpy.core.numeric _frombuffer": Global.FROM_BUFFER,
    "numpy._core.numeric _frombuffer": Global.FROM_BUFFER,
    "numpy.core.multiarray scalar": Global.SCALAR,
    "numpy._core.multiarray scalar": Global.SCALAR,
    "numpy ndarray": Global.NDARRAY,
    "numpy dtype": Global.DTYPE,
    "_codecs encode": Global.ENCODE,
    "builtins bytes": Global.BYTES,
    "__builtin__ bytes": Global.BYTES,
    "builtins tuple": Global.TUPLE,
    "__builtin__ tuple": Global.TUPLE,
    "collections OrderedDict": Global.ORDERED_DICT,
}


class ShortText(str):
    """Short ASCII text that knows where it lies, since protocol 2 writes the bytes of arrays as text."""

    __slots__ = ("at",)
    at: int


@dataclass(frozen=True, slots=True)
class LongText:
    """Text that is no name, and so not read: it is long or has other characters than ASCII."""

    at: int
    length: int


@dataclass(frozen=True, slots=True)
class RawBytes:
    """Bytes of the file, not read."""

    at: int
    length: int
    as_text: bool = False  # each a character of Latin-1 in UTF-8


class Unfinished:
    """An array or a data type between its creation (REDUCE) and its content (BUILD)."""

    def __init__(self, kind: Global, dtype: torch.dtype | None = None) -> None:
        self.kind = kind
        self.dtype = dtype
        self.built: StoredArray | torch.dtype | None = None


class PdParamsPickle(PickleMachine):
    """Runs the pickle of one file.

    Args:
        path: for messages.
        content: the mapped file.
    """

    protocols = range(2, 6)
    actions: ClassVar[Actions] = {
        **PROTOCOL_4,
        ord("C"): lambda machine: machine._bytes(U8),
        ord("B"): lambda machine: machine._bytes(U32),
        0x8E: lambda machine: machine._bytes(U64),
        0x96: lambda machine: machine._bytes(U64),  # a bytearray
    }
    names = GLOBALS
    leaves = (StoredArray,)

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        super().__init__(content)
        self._path = path
        self._mapped = content

    def text(self, at: int, length: int) -> ShortText | LongText:
        if length <= MAX_TEXT_BYTES and (raw := self.content[at : at + length]).isascii():
            text = ShortText(raw.decode("ascii"))
            text.at = at
            return text
        return LongText(at, length)

    def key(self, value: Any) -> str:
        if not isinstance(value, ShortText) or not value.isprintable():
            self.fail("a key that is not short ASCII text")
        return str(value)

    def recall(self, index: int) -> Any:
        value = super().recall(index)
        return value.built if isinstance(value, Unfinished) and value.built is not None else value

    def call(self, called: Enum, arguments: tuple[Any, ...]) -> Any:
        match called, arguments:
            case Global.RECONSTRUCT, (Global.NDARRAY, (0,), RawBytes()):
                return Unfinished(Global.RECONSTRUCT)
            case Global.DTYPE, (ShortText() as code, 0, 1):
                return Unfinished(Global.DTYPE, self._dtype(code))
            case Global.FROM_BUFFER, (RawBytes() as raw, torch.dtype() as dtype, tuple() as shape, "C" | "F" as order):
                return self._array(shape, dtype, raw, order == "F")
            case Global.SCALAR, (torch.dtype() as dtype, RawBytes() as raw):
                return self._scalar(dtype, raw)
            case Global.ENCODE, (ShortText() as text, "latin1"):
                return RawBytes(text.at, len(text))  # ASCII: its bytes are what is meant
            case Global.ENCODE, (LongText() as text, "latin1"):
                return RawBytes(text.at, text.length, as_text=True)
            case Global.BYTES, ():
                return RawBytes(0, 0)
            case Global.TUPLE, ((ShortText(), StoredArray()) as named,):
                return named
            case Global.ORDERED_DICT, ():
                return {}
        return super().call(called, arguments)

    def build(self, target: Any, state: Any) -> Any:
        if not isinstance(target, Unfinished) or target.built is not None:
            return super().build(target, state)
        match target.kind, state:
            case Global.RECONSTRUCT, (
                1,
                tuple() as shape,
                torch.dtype() as dtype,
                bool() as fortran,
                RawBytes() as raw,
            ):
                target.built = self._array(shape, dtype, raw, fortran)
            case Global.DTYPE, (3, str() as order, None, None, None, -1, -1, 0) if target.dtype is not None:
                if order == ">":
                    self.fail("an array of big-endian numbers, which Paddle does not write")
                if order != ("|" if target.dtype.itemsize == 1 else "<"):
                    self.fail("a data type with an unknown order of bytes")
                target.built = target.dtype
            case Global.DTYPE, _:
                self.distrust("has a data type with fields or metadata")
            case _:
                self.fail("an array whose state is not known")
        return target.built

    def _dtype(self, code: str) -> torch.dtype:
        if code.startswith("O"):
            self.distrust("has an array of Python objects")
        if code not in DTYPES:
            self.fail(f"an array of the data type {code[:20]!r}, which is none of numbers")
        return DTYPES[code]

    def _array(self, shape: tuple[Any, ...], dtype: torch.dtype, raw: RawBytes, fortran: bool) -> StoredArray:
        if not is_shape(shape):
            self.fail("an array whose shape is none")
        nbytes = prod(shape) * dtype.itemsize
        # As text, a byte from 128 on takes two bytes; how many there are is seen when they are read.
        if not nbytes <= raw.length <= nbytes * (2 if raw.as_text else 1):
            self.fail(f"an array of shape {shape} needs {nbytes} bytes and is given {raw.length}")
        payload: Payload = FileBytes(self._mapped, raw.at, nbytes)
        if raw.as_text:
            payload = Latin1Bytes(self._path, self._mapped, raw.at, raw.length, nbytes)
        return StoredArray(self._path, shape, dtype, payload, fortran)

    def _scalar(self, dtype: torch.dtype, raw: RawBytes) -> int | float:
        if dtype.is_complex:
            self.fail("a complex number")
        value = self._array((), dtype, raw, False).load().item()
        return value if isinstance(value, int) else float(value)

    def _bytes(self, form: struct.Struct) -> None:
        length = self.number(form)
        self.push(RawBytes(self.take(length), length))

    # Errors

    def refuse_start(self) -> NoReturn:
        raise FormatError(f"{self._path}: does not begin as a file of paddle.save does; is it another kind of file?")

    def fail(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._path}: not a valid file of Paddle weights: {what} (at byte {self.opcode_at}); fetch it again"
        )

    def distrust(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._path}: {what} (at byte {self.opcode_at}), which weights saved by Paddle never do and which may run "
            "code; it was not run: do not trust this file"
        )
