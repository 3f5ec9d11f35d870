"""Reading a pickle without the power to run anything: the few opcodes and names that Paddle's weight files consist of.

A pickle is a program for a small stack machine, and the usual machine can import and call whatever the file says. This
one calls nothing: it knows the shapes that `paddle.save` leaves (dicts, lists, tuples, numbers, text, NumPy arrays) and
refuses the rest by name. An array's bytes are not taken into memory; where they lie is noted.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py. Shapes: `paddle/framework/io.py` of Paddle 3.3.1
(protocols 2, 3 and 4) and `ndarray.__reduce_ex__` of NumPy 1 and 2 (protocol 5 too).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from arriero.errors import FormatError
from arriero.formats.paddle.pickled_values import (
    DTYPES,
    GLOBALS,
    Global,
    LongText,
    RawBytes,
    ShortText,
    Unfinished,
)
from arriero.formats.paddle.stored_array import FileBytes, Latin1Bytes, Payload, StoredArray, is_shape

# Limits far above any honest file and far below what would hurt. An array takes 50 opcodes; LLaMA 405B has 1,137.
MAX_OPCODES = 2**19
MAX_STACK = 16_384
MAX_DEPTH = 16
MAX_TEXT_BYTES = 1024
MAX_INT_BYTES = 16
# What is reached by several ways counts each time: honest files share a tensor's name and tied weights, bombs all.
MAX_VALUES_PER_OPCODE = 4

_REFUSED = object()
_U8, _U16, _U32, _U64 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")  # pickle's floats are big-endian


class PickleMachine:
    """Runs one file.

    Args:
        path: for messages.
        content: the mapped file.
    """

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._at = 0
        self._opcode_at = 0
        self._opcodes = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the file holds: dict, list, tuple, str, int, float, bool, None and `StoredArray`.

        Lists and dicts are new ones; a value that the file refers to several times is the same object each time.

        Raises:
            FormatError: naming the file, the byte and what is wrong there.
        """
        if self._size < 3 or self._content[0] != 0x80 or self._content[1] not in range(2, 6):
            raise FormatError(
                f"{self._path}: does not begin as a file of paddle.save does; is it another kind of file?"
            )
        self._at = 2
        for self._opcodes in range(1, MAX_OPCODES + 1):
            self._opcode_at = self._at
            opcode = self._content[self._take(1)]
            if opcode == _STOP:
                return self._result()
            action = _ACTIONS.get(opcode)
            if action is None:
                self._distrust(f"uses the pickle opcode 0x{opcode:02x}")
            action(self)
        raise FormatError(f"{self._path}: holds more than {MAX_OPCODES} pickle opcodes; this is no file of weights")

    def _result(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            self._fail("it ends in the middle of a value")
        if self._at != self._size:
            self._fail(f"{self._size - self._at} bytes follow its end")
        self._measure(self._stack[0], 0, {}, MAX_VALUES_PER_OPCODE * self._opcodes)
        return self._stack[0]

    def _measure(self, value: Any, depth: int, known: dict[int, tuple[int, int]], limit: int) -> tuple[int, int]:
        """How deep a value goes and how many values it has, counted anew each time that one is reached."""
        if not isinstance(value, dict | list | tuple):
            if value is not None and not isinstance(value, str | int | float | StoredArray):
                self._fail("it holds bytes, long text or a half-made array where a value should be")
            return 0, 1
        if depth > MAX_DEPTH:
            self._fail(f"its values are nested more than {MAX_DEPTH} deep")
        if id(value) not in known:
            height, count = 0, 1
            for child in value.values() if isinstance(value, dict) else value:
                below, values = self._measure(child, depth + 1, known, limit)
                height, count = max(height, below + 1), count + values
            known[id(value)] = height, count
        height, count = known[id(value)]
        if depth + height > MAX_DEPTH:
            self._fail(f"its values are nested more than {MAX_DEPTH} deep")
        if count > limit:
            self._fail("it refers to the same values again and again")
        return height, count

    # Reading

    def _take(self, count: int) -> int:
        """Where the next `count` bytes begin, all of which must lie in the file."""
        at = self._at
        if count > self._size - at:
            self._fail(f"the file ends after {self._size} bytes, {count} more were announced")
        self._at = at + count
        return at

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self._content, self._take(form.size))[0]

    def _push(self, value: Any) -> None:
        if len(self._stack) >= MAX_STACK:
            self._fail("it leaves thousands of values on the stack")
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self._fail("a value is missing")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            self._fail("a mark is missing")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    # Opcodes

    def _frame(self) -> None:
        length = self._number(_U64)
        if length > self._size - self._at:
            self._fail(f"the file ends after {self._size} bytes, {length} more were announced")

    def _mark(self) -> None:
        if len(self._marks) >= MAX_STACK:
            self._fail("it leaves thousands of values on the stack")
        self._marks.append(len(self._stack))

    def _long1(self) -> None:
        length = self._number(_U8)
        if length > MAX_INT_BYTES:
            self._fail(f"an integer of {length} bytes")
        at = self._take(length)
        self._push(int.from_bytes(self._content[at : at + length], "little", signed=True))

    def _text(self, form: struct.Struct) -> None:
        length = self._number(form)
        at = self._take(length)
        if length <= MAX_TEXT_BYTES and (raw := self._content[at : at + length]).isascii():
            text = ShortText(raw.decode("ascii"))
            text.at = at
            self._push(text)
        else:
            self._push(LongText(at, length))

    def _bytes(self, form: struct.Struct) -> None:
        length = self._number(form)
        self._push(RawBytes(self._take(length), length))

    def _tuple(self, length: int) -> None:
        self._push(tuple([self._pop() for _ in range(length)][::-1]))

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            self._fail("it appends to something that is no list")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            self._fail("it sets items of something that is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, ShortText) or not key.isprintable():
                self._fail("a key that is not short ASCII text")
            if key in target:
                self._fail(f"the key {key[:80]!r} appears twice")
            target[str(key)] = value

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _put(self, index: int) -> None:
        if index in self._memo:
            self._fail("it overwrites a value that it remembered")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            self._fail("it refers to a value that it did not remember")
        value = self._memo[index]
        self._push(value.built if isinstance(value, Unfinished) and value.built is not None else value)

    def _global(self) -> None:
        end = self._content.find(b"\n", self._at, self._at + MAX_TEXT_BYTES)
        stop = self._content.find(b"\n", end + 1, end + 1 + MAX_TEXT_BYTES) if end >= 0 else -1
        if stop < 0:
            self._fail("a name without an end")
        module, name = self._content[self._at : end], self._content[end + 1 : stop]
        self._at = stop + 1
        self._name(module.decode("ascii", "replace"), name.decode("ascii", "replace"))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self._fail("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        known = GLOBALS.get((module, name))
        if known is None:
            shown = f"{module}.{name}"
            self._distrust(f"asks for {(shown if shown.isprintable() else repr(shown))[:100]}")
        self._push(known)

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Global) or type(arguments) is not tuple:
            self._distrust("calls something that is no function")
        result = self._call(called, arguments)
        if result is _REFUSED:
            self._distrust(f"makes {called.value} in an unknown way")
        self._push(result)

    def _call(self, called: Global, arguments: tuple[Any, ...]) -> Any:
        """What a call amounts to, or `_REFUSED`."""
        match called, arguments:
            case Global.RECONSTRUCT, (Global.NDARRAY, (0,), RawBytes()):
                return Unfinished(called)
            case Global.DTYPE, (ShortText() as code, 0, 1):
                return Unfinished(called, self._dtype(code))
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
        return _REFUSED

    def _build(self) -> None:
        state, blank = self._pop(), self._pop()
        if not isinstance(blank, Unfinished) or blank.built is not None:
            self._distrust("sets the state of an object")
        match blank.kind, state:
            case Global.RECONSTRUCT, (
                1,
                tuple() as shape,
                torch.dtype() as dtype,
                bool() as fortran,
                RawBytes() as raw,
            ):
                blank.built = self._array(shape, dtype, raw, fortran)
            case Global.DTYPE, (3, str() as order, None, None, None, -1, -1, 0) if blank.dtype is not None:
                if order == ">":
                    self._fail("an array of big-endian numbers, which Paddle does not write")
                if order != ("|" if blank.dtype.itemsize == 1 else "<"):
                    self._fail("a data type with an unknown order of bytes")
                blank.built = blank.dtype
            case Global.DTYPE, _:
                self._distrust("has a data type with fields or metadata")
            case _:
                self._fail("an array whose state is not known")
        self._push(blank.built)

    def _dtype(self, code: str) -> torch.dtype:
        if code.startswith("O"):
            self._distrust("has an array of Python objects")
        if code not in DTYPES:
            self._fail(f"an array of the data type {code[:20]!r}, which is none of numbers")
        return DTYPES[code]

    def _array(self, shape: tuple[Any, ...], dtype: torch.dtype, raw: RawBytes, fortran: bool) -> StoredArray:
        if not is_shape(shape):
            self._fail("an array whose shape is none")
        nbytes = prod(shape) * dtype.itemsize
        # As text, a byte from 128 on takes two bytes; how many there are is seen when they are read.
        if not nbytes <= raw.length <= nbytes * (2 if raw.as_text else 1):
            self._fail(f"an array of shape {shape} needs {nbytes} bytes and is given {raw.length}")
        payload: Payload = FileBytes(self._content, raw.at, nbytes)
        if raw.as_text:
            payload = Latin1Bytes(self._path, self._content, raw.at, raw.length, nbytes)
        return StoredArray(self._path, shape, dtype, payload, fortran)

    def _scalar(self, dtype: torch.dtype, raw: RawBytes) -> int | float:
        if dtype.is_complex:
            self._fail("a complex number")
        value = self._array((), dtype, raw, False).load().item()
        return value if isinstance(value, int) else float(value)

    # Errors

    def _fail(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._path}: not a valid file of Paddle weights: {what} (at byte {self._opcode_at}); fetch it again"
        )

    def _distrust(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self._path}: {what} (at byte {self._opcode_at}), which weights saved by Paddle never do and which may run "
            "code; it was not run: do not trust this file"
        )


_STOP = ord(".")
_ACTIONS: dict[int, Callable[[PickleMachine], None]] = {
    0x95: PickleMachine._frame,
    ord("("): PickleMachine._mark,
    ord("N"): lambda machine: machine._push(None),
    0x88: lambda machine: machine._push(True),
    0x89: lambda machine: machine._push(False),
    ord("J"): lambda machine: machine._push(machine._number(_I32)),
    ord("K"): lambda machine: machine._push(machine._number(_U8)),
    ord("M"): lambda machine: machine._push(machine._number(_U16)),
    0x8A: PickleMachine._long1,
    ord("G"): lambda machine: machine._push(machine._number(_F64)),
    0x8C: lambda machine: machine._text(_U8),
    ord("X"): lambda machine: machine._text(_U32),
    0x8D: lambda machine: machine._text(_U64),
    ord("C"): lambda machine: machine._bytes(_U8),
    ord("B"): lambda machine: machine._bytes(_U32),
    0x8E: lambda machine: machine._bytes(_U64),
    0x96: lambda machine: machine._bytes(_U64),  # a bytearray
    ord(")"): lambda machine: machine._push(()),
    0x85: lambda machine: machine._tuple(1),
    0x86: lambda machine: machine._tuple(2),
    0x87: lambda machine: machine._tuple(3),
    ord("t"): lambda machine: machine._push(tuple(machine._pop_to_mark())),
    ord("]"): lambda machine: machine._push([]),
    ord("a"): lambda machine: machine._append([machine._pop()]),
    ord("e"): lambda machine: machine._append(machine._pop_to_mark()),
    ord("}"): lambda machine: machine._push({}),
    ord("s"): PickleMachine._set_item,
    ord("u"): lambda machine: machine._set_items(machine._pop_to_mark()),
    ord("h"): lambda machine: machine._get(machine._number(_U8)),
    ord("j"): lambda machine: machine._get(machine._number(_U32)),
    ord("q"): lambda machine: machine._put(machine._number(_U8)),
    ord("r"): lambda machine: machine._put(machine._number(_U32)),
    0x94: lambda machine: machine._put(len(machine._memo)),
    ord("c"): PickleMachine._global,
    0x93: PickleMachine._stack_global,
    ord("R"): PickleMachine._reduce,
    ord("b"): PickleMachine._build,
}
