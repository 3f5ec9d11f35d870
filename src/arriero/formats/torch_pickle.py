"""The pickle in a file of torch.save, read as data: what it describes, without making any of it.

A pickle is a program for a small stack machine. This one knows the instructions that torch.save uses (protocol 2) and the
handful of names that a state dict needs, each of which only becomes a description. It imports nothing, calls nothing and
takes no memory beyond a few times the pickle itself, unlike torch.load(weights_only=True), whose allow-list can be asked for
buffers of any size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arriero.errors import FormatError

MAX_PICKLE_BYTES = 2 * 2**20  # some 20,000 tensors
MAX_CONTAINERS = 200_000  # a tensor is seven
MAX_INTEGER_BYTES = 8
MAX_DIMENSIONS = 8

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
ORDERED_DICT = "collections OrderedDict"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ALLOWED = {REBUILD_TENSOR, _REBUILD_PARAMETER, ORDERED_DICT, *(f"torch {name}" for name in STORAGES)}


@dataclass(frozen=True)
class DescribedStorage:
    """`count` numbers of a dtype in the record data/`key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class DescribedTensor:
    """A strided view of a storage; offset and strides count numbers. Not checked against the storage."""

    storage: DescribedStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    """Where the items of a tuple or of several dict entries begin on the stack."""


_MARK = _Mark()


def read_pickle(code: bytes, source: str) -> Any:
    """What a pickle describes: dicts, lists, tuples, texts, numbers, and descriptions of tensors.

    Raises:
        FormatError: for a name or an instruction that a state dict of torch.save never has, or a broken pickle.
    """
    if len(code) > MAX_PICKLE_BYTES:
        raise FormatError(f"{source}: its pickle has {len(code)} bytes, more than any model's ({MAX_PICKLE_BYTES})")
    machine = _Machine(code, source)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise FormatError(f"{source}: its pickle is cut short or corrupt; fetch it again") from error


class _Machine:
    def __init__(self, code: bytes, source: str) -> None:
        self.code = code
        self.source = source
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.containers = 0

    def run(self) -> Any:
        while True:
            instruction = self.take(1)
            if instruction == b".":
                return self.stack.pop()
            step = _INSTRUCTIONS.get(instruction)
            if step is None:
                raise FormatError(
                    f"{self.source}: its pickle has the instruction {instruction!r}, which torch.save never writes; "
                    "nothing was run"
                )
            step(self)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.code):
            raise ValueError("past the end")
        taken = self.code[self.at : end]
        self.at = end
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.code.index(b"\n", self.at, self.at + 256)
        taken = self.code[self.at : end]
        self.at = end + 1
        return taken.decode("utf-8", "replace")

    def push_container(self, value: Any) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise FormatError(f"{self.source}: its pickle makes more than {MAX_CONTAINERS} containers; no model does")
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[start], _Mark):
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise ValueError("no mark")

    def top(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError("an empty stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def name(self) -> None:
        module, name = self.line(), self.line()
        if f"{module} {name}" not in _ALLOWED:
            raise FormatError(
                f"{self.source}: its pickle names {f'{module}.{name}'[:80]!r}, which weights do not need; nothing was run. "
                "Keep only the tensors: torch.save(model.state_dict(), ...)"
            )
        self.stack.append(_Global(f"{module} {name}"))

    def call(self) -> None:
        function, arguments = self.top(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of no function")
        if function.name == ORDERED_DICT and not arguments:
            self.push_container({})
        elif function.name == REBUILD_TENSOR and len(arguments) in (6, 7):
            self.push_container(_describe_tensor(arguments))
        elif function.name == _REBUILD_PARAMETER and len(arguments) == 3 and isinstance(arguments[0], DescribedTensor):
            self.stack.append(arguments[0])
        else:
            raise ValueError("a call with other arguments than torch.save's")

    def refer(self) -> None:
        (reference,) = self.top(1)
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, _Global) or not storage.name.startswith("torch "):
            raise ValueError("a reference to no storage")
        if not isinstance(key, str) or not _is_count(count):
            raise ValueError("a storage of no size")
        self.push_container(DescribedStorage(key, STORAGES[storage.name.removeprefix("torch ")], count))

    def build(self) -> None:
        # The state of an OrderedDict: torch's `_metadata` of modules, which says nothing about weights.
        target, _ = self.top(2)
        if not isinstance(target, dict):
            raise ValueError("a state for something else than an OrderedDict")
        self.stack.append(target)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # so that hashing never goes deep
                raise ValueError("a key that is no text")
            if key in target:
                raise FormatError(f"{self.source}: holds {str(key)[:80]!r} twice; fetch it again")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items for something else than a list")
        target.extend(items)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def text(self) -> None:
        length = self.number("<I")
        self.stack.append(self.take(length).decode("utf-8"))

    def long(self) -> None:
        length = self.number("<B")
        if length > MAX_INTEGER_BYTES:
            raise FormatError(f"{self.source}: its pickle has a number of {length} bytes; no model does")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def protocol(self) -> None:
        if (version := self.number("<B")) != 2:
            raise FormatError(
                f"{self.source}: its pickle has protocol {version}; torch.save writes 2 unless told otherwise: save it again"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _describe_tensor(arguments: tuple[Any, ...]) -> DescribedTensor:
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, DescribedStorage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor of no storage")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, (offset, *shape, *stride))):
        raise ValueError("a tensor of no shape")
    return DescribedTensor(storage, offset, shape, stride)


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"(": lambda machine: machine.stack.append(_MARK),
    b"}": lambda machine: machine.push_container({}),
    b"]": lambda machine: machine.push_container([]),
    b")": lambda machine: machine.stack.append(()),
    b"t": lambda machine: machine.push_container(tuple(machine.since_mark())),
    b"\x85": lambda machine: machine.push_container(machine.top(1)),
    b"\x86": lambda machine: machine.push_container(machine.top(2)),
    b"\x87": lambda machine: machine.push_container(machine.top(3)),
    b"N": lambda machine: machine.stack.append(None),
    b"\x88": lambda machine: machine.stack.append(True),
    b"\x89": lambda machine: machine.stack.append(False),
    b"J": lambda machine: machine.stack.append(machine.number("<i")),
    b"K": lambda machine: machine.stack.append(machine.number("<B")),
    b"M": lambda machine: machine.stack.append(machine.number("<H")),
    b"G": lambda machine: machine.stack.append(machine.number(">d")),
    b"\x8a": _Machine.long,
    b"X": _Machine.text,
    b"h": lambda machine: machine.stack.append(machine.memo[machine.number("<B")]),
    b"j": lambda machine: machine.stack.append(machine.memo[machine.number("<I")]),
    b"q": lambda machine: machine.remember(machine.number("<B")),
    b"r": lambda machine: machine.remember(machine.number("<I")),
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"Q": _Machine.refer,
    b"b": _Machine.build,
    b"s": lambda machine: machine.set_items(list(machine.top(2))),
    b"u": lambda machine: machine.set_items(machine.since_mark()),
    b"a": lambda machine: machine.append(list(machine.top(1))),
    b"e": lambda machine: machine.append(machine.since_mark()),
}
