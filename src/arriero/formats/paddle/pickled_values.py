"""What a pickle of arrays is made of: the names it may use, and its values before they are whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from arriero.formats.paddle.stored_array import StoredArray

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
    ("numpy.core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): Global.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): Global.FROM_BUFFER,
    ("numpy.core.multiarray", "scalar"): Global.SCALAR,
    ("numpy._core.multiarray", "scalar"): Global.SCALAR,
    ("numpy", "ndarray"): Global.NDARRAY,
    ("numpy", "dtype"): Global.DTYPE,
    ("_codecs", "encode"): Global.ENCODE,
    ("builtins", "bytes"): Global.BYTES,
    ("__builtin__", "bytes"): Global.BYTES,
    ("builtins", "tuple"): Global.TUPLE,
    ("__builtin__", "tuple"): Global.TUPLE,
    ("collections", "OrderedDict"): Global.ORDERED_DICT,
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
