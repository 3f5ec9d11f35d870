"""Reading a pickle without the power to run anything: as data, opcode by opcode.

A pickle is a program for a small stack machine, and the usual machine can import and call whatever the file says. This
one calls nothing: it knows numbers, text, tuples, lists and dicts, and leaves it to a subclass for one kind of file what
the few names, calls and states that such a file consists of amount to. All else is refused by name.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

from __future__ import annotations

import mmap
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, NoReturn

# Limits far above any honest file and far below what would hurt. A tensor of torch.save takes 36 opcodes and makes 7
# containers, an array of paddle.save 50 and 8; LLaMA 405B has 1,137.
MAX_OPCODES = 2**19
MAX_CONTAINERS = 200_000
MAX_STACK = 16_384
MAX_DEPTH = 16
MAX_INT_BYTES = 8
MAX_NAME_BYTES = 256
# What is reached by several ways counts each time: honest files share a tensor's name and tied weights, bombs all.
MAX_VALUES_PER_OPCODE = 4

U8, U16, U32, U64 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
I32, F64 = struct.Struct("<i"), struct.Struct(">d")  # pickle's floats are big-endian
_PROTO, _STOP = 0x80, ord(".")

Actions = Mapping[int, Callable[[Any], None]]


class PickleMachine(ABC):
    """Runs one pickle. A subclass says what a kind of file may hold.

    Attributes:
        protocols: the versions of the pickle format that it may have.
        actions: what each opcode does: `PROTOCOL_2` or `PROTOCOL_4`, and more.
        names: what stands for each "module name" that it may ask for. Functions are members of an `Enum` whose values say
            what they make, for messages.
        leaves: types of the values that it describes, besides text and numbers.
        content: the pickle, in memory or mapped.
    """

    protocols: ClassVar[range]
    actions: ClassVar[Actions]
    names: ClassVar[Mapping[str, Any]]
    leaves: ClassVar[tuple[type, ...]]

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self.content = content
        self._size = len(content)
        self._at = 0
        self._containers = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._floor = 0  # how much of the stack lies below the last mark
        self._memo: dict[int, Any] = {}
        self.opcode_at = 0
        self._described: tuple[type, ...] = (str, int, float, type(None), *self.leaves)

    def run(self) -> Any:
        """What the pickle holds: dict, list, tuple, text, int, float, bool, None and what the subclass describes.

        Lists and dicts are new ones; a value that the pickle refers to several times is the same object each time.

        Raises:
            FormatError: naming the file, the byte and what is wrong there.
        """
        content, actions = self.content, self.actions
        if self._size < 3 or content[0] != _PROTO or content[1] not in self.protocols:
            self.refuse_start()
        self._at = 2
        for opcodes in range(1, MAX_OPCODES + 1):
            self.opcode_at = at = self._at
            if at == self._size:
                self.take(1)  # which is refused
            self._at = at + 1
            opcode = content[at]
            if opcode == _STOP:
                return self._result(opcodes)
            action = actions.get(opcode)
            if action is None:
                self.distrust(f"uses the pickle opcode 0x{opcode:02x}")
            action(self)
        return self.fail(f"it holds more than {MAX_OPCODES} pickle opcodes, and no file of weights does")

    def _result(self, opcodes: int) -> Any:
        if len(self._stack) != 1 or self._marks:
            self.fail("it ends in the middle of a value")
        if self._at != self._size:
            self.fail(f"{self._size - self._at} bytes follow its end")
        self._measure(self._stack[0], 0, {}, MAX_VALUES_PER_OPCODE * opcodes)
        return self._stack[0]

    def _measure(self, value: Any, depth: int, known: dict[int, tuple[int, int]], limit: int) -> tuple[int, int]:
        """How deep a value goes and how many values it has, counted anew each time that one is reached."""
        if not isinstance(value, dict | list | tuple):
            if not isinstance(value, self._described):
                self.fail("it holds bytes, long text, a name or a half-made array where a value should be")
            return 0, 1
        if depth > MAX_DEPTH:
            self.fail(f"its values are nested more than {MAX_DEPTH} deep")
        if id(value) not in known:
            height, count = 0, 1
            for child in value.values() if isinstance(value, dict) else value:
                below, values = self._measure(child, depth + 1, known, limit)
                height, count = max(height, below + 1), count + values
            known[id(value)] = height, count
        height, count = known[id(value)]
        if depth + height > MAX_DEPTH:
            self.fail(f"its values are nested more than {MAX_DEPTH} deep")
        if count > limit:
            self.fail("it refers to the same values again and again")
        return height, count

    # What a kind of file gives

    @abstractmethod
    def text(self, at: int, length: int) -> Any:
        """The value of a text: UTF-8 that lies in `content`."""

    @abstractmethod
    def key(self, value: Any) -> str | int:
        """A dict's key made of a value, or a refusal. Its hash takes little time."""

    def call(self, called: Enum, arguments: tuple[Any, ...]) -> Any:
        """What a call amounts to; none does here."""
        self.distrust(f"makes {called.value} in an unknown way")

    def build(self, target: Any, state: Any) -> Any:
        """What an object with a state amounts to; none does here."""
        self.distrust("sets the state of an object")

    def recall(self, index: int) -> Any:
        """The value that was remembered under a number."""
        if index not in self._memo:
            self.fail("it refers to a value that it did not remember")
        return self._memo[index]

    @abstractmethod
    def refuse_start(self) -> NoReturn:
        """Refuse what does not begin as the pickles of these `protocols` do."""

    @abstractmethod
    def fail(self, what: str) -> NoReturn:
        """Refuse what is broken."""

    @abstractmethod
    def distrust(self, what: str) -> NoReturn:
        """Refuse what may run code; `what` follows a subject."""

    # Reading

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin, all of which must lie in the content."""
        at = self._at
        if count > self._size - at:
            self.fail(f"it ends after {self._size} bytes, {count} more were announced")
        self._at = at + count
        return at

    def number(self, form: struct.Struct) -> Any:
        at, end = self._at, self._at + form.size
        if end > self._size:
            self.fail(f"it ends after {self._size} bytes, {form.size} more were announced")
        self._at = end
        return form.unpack_from(self.content, at)[0]

    def _line(self) -> str:
        end = self.content.find(b"\n", self._at, self._at + MAX_NAME_BYTES)
        if end < 0:
            self.fail("a name without an end")
        line = self.content[self._at : end]
        self._at = end + 1
        return line.decode("ascii", "replace")

    def push(self, value: Any) -> None:
        if len(self._stack) >= MAX_STACK:
            self.fail("it leaves thousands of values on the stack")
        self._stack.append(value)

    def make(self, value: Any) -> None:
        """Push a value that takes memory of its own."""
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            self.fail(f"it makes more than {MAX_CONTAINERS} containers, and no file of weights does")
        self.push(value)

    def pop_last(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        if start < self._floor:
            self.fail("a value is missing")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            self.fail("a mark is missing")
        start = self._marks.pop()
        self._floor = self._marks[-1] if self._marks else 0
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self) -> Any:
        if len(self._stack) <= self._floor:
            self.fail("a value is missing")
        return self._stack[-1]

    # Opcodes

    def _mark(self) -> None:
        if len(self._marks) >= MAX_STACK:
            self.fail("it leaves thousands of values on the stack")
        self._floor = len(self._stack)
        self._marks.append(self._floor)

    def _long1(self) -> None:
        length = self.number(U8)
        if length > MAX_INT_BYTES:
            self.fail(f"an integer of {length} bytes")
        at = self.take(length)
        self.push(int.from_bytes(self.content[at : at + length], "little", signed=True))

    def _frame(self) -> None:
        length = self.number(U64)
        self.take(length)
        self._at -= length

    def _text(self, form: struct.Struct) -> None:
        length = self.number(form)
        self.push(self.text(self.take(length), length))

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            self.fail("it appends to something that is no list")
        target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            self.fail("it sets items of something that is no dict")
        for raw, value in zip(values[::2], values[1::2], strict=True):
            key = self.key(raw)
            if key in target:
                self.fail(f"the key {str(key)[:80]!r} appears twice")
            target[key] = value

    def _put(self, index: int) -> None:
        if index in self._memo:
            self.fail("it overwrites a value that it remembered")
        self._memo[index] = self._top()

    def _global(self) -> None:
        module = self._line()
        self._name(module, self._line())

    def _stack_global(self) -> None:
        module, name = self.pop_last(2)
        if not isinstance(name, str) or not isinstance(module, str):
            self.fail("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        known = self.names.get(f"{module} {name}")
        if known is None:
            shown = f"{module}.{name}"
            self.distrust(f"asks for {(shown if shown.isprintable() else repr(shown))[:100]}")
        self.push(known)

    def _reduce(self) -> None:
        called, arguments = self.pop_last(2)
        if not isinstance(called, Enum) or type(arguments) is not tuple:
            self.distrust("calls something that is no function")
        self.make(self.call(called, arguments))

    def _build(self) -> None:
        target, state = self.pop_last(2)
        self.push(self.build(target, state))


# What Python's pickle writes for plain values, names, calls and states: up to protocol 2, and from 4 on.
PROTOCOL_2: Actions = {
    ord("("): PickleMachine._mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.push(machine.number(I32)),
    ord("K"): lambda machine: machine.push(machine.number(U8)),
    ord("M"): lambda machine: machine.push(machine.number(U16)),
    0x8A: PickleMachine._long1,
    ord("G"): lambda machine: machine.push(machine.number(F64)),
    ord("X"): lambda machine: machine._text(U32),
    ord(")"): lambda machine: machine.push(()),
    0x85: lambda machine: machine.make(tuple(machine.pop_last(1))),
    0x86: lambda machine: machine.make(tuple(machine.pop_last(2))),
    0x87: lambda machine: machine.make(tuple(machine.pop_last(3))),
    ord("t"): lambda machine: machine.make(tuple(machine._pop_to_mark())),
    ord("]"): lambda machine: machine.make([]),
    ord("a"): lambda machine: machine._append(machine.pop_last(1)),
    ord("e"): lambda machine: machine._append(machine._pop_to_mark()),
    ord("}"): lambda machine: machine.make({}),
    ord("s"): lambda machine: machine._set_items(machine.pop_last(2)),
    ord("u"): lambda machine: machine._set_items(machine._pop_to_mark()),
    ord("h"): lambda machine: machine.push(machine.recall(machine.number(U8))),
    ord("j"): lambda machine: machine.push(machine.recall(machine.number(U32))),
    ord("q"): lambda machine: machine._put(machine.number(U8)),
    ord("r"): lambda machine: machine._put(machine.number(U32)),
    ord("c"): PickleMachine._global,
    ord("R"): PickleMachine._reduce,
    ord("b"): PickleMachine._build,
}
PROTOCOL_4: Actions = {
    **PROTOCOL_2,
    0x95: PickleMachine._frame,
    0x8C: lambda machine: machine._text(U8),
    0x8D: lambda machine: machine._text(U64),
    0x94: lambda machine: machine._put(len(machine._memo)),
    0x93: PickleMachine._stack_global,
}
