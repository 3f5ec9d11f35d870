"""Finds calls of tools in an answer while it grows. The grammar has seen to it that they are whole, if the answer is."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from arriero.serving.openai.tool_format import ToolFormat

_State = Literal["text", "name", "arguments", "end"]


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may hold.

    Attributes:
        form: how they are written.
        functions: the names of those that it may call. What names another one is no call.
        beside_json: whether an answer that calls nothing is JSON, and so may begin as a call does.
    """

    form: ToolFormat
    functions: tuple[str, ...]
    beside_json: bool = False


@dataclass(frozen=True)
class Part:
    """What a piece of text turned out to be.

    Attributes:
        text: of the answer itself, or of the call's arguments.
        call: the call's number; None for the answer's own text.
        id, name: of a call that begins with this part.
        thought: whether it was thought and not said.
        passed: characters of the answer before it that are no part of anything.
    """

    text: str
    call: int | None = None
    id: str | None = None
    name: str | None = None
    thought: bool = False
    passed: int = 0


class CallReader:
    """Takes an answer's text piece by piece.

    Attributes:
        calls: how many have begun.
        left_out: whether the answer ended before it was known which function it calls.
    """

    def __init__(self, expected: Calls) -> None:
        self._expected, self._form = expected, expected.form
        self._held = ""
        self._state: _State = "text"
        self._begun = False  # whether any text was released: then an answer without an opening is no call
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls = 0
        self.left_out = False

    def push(self, text: str) -> list[Part]:
        """What can be told now."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self, *, cut: bool = False) -> list[Part]:
        """What was held back, at the end. What only a call begins with is never shown as text.

        Args:
            cut: whether the answer ended before it was complete.
        """
        held, self._held = self._held, ""
        if self._state == "name":
            name, known, _ = held.partition('"')
            if not self._form.opening and not (cut and (known or not self._expected.beside_json)):
                return [Part(self._form.before_name() + held)]  # it is a text that begins like a call
            if known:
                return [self._begin(name)]
        marker = held.lstrip()
        may_be_json = self._expected.beside_json and not self._form.opening
        if self._state == "name" or (cut and self._state == "text" and not may_be_json and self._begins_call(marker)):
            self.left_out = True
            return []
        if self._state == "text" and held and not (self.calls and not marker):
            return [Part(held)]
        return []

    def _begins_call(self, text: str) -> bool:
        """Whether the end of an answer must have become a call; a single character of it after other text need not."""
        alone = self.calls > 0 or not self._begun
        return len(text) > (0 if alone else 1) and self._form.before_name().startswith(text)

    def _begin(self, name: str) -> Part:
        self.calls += 1
        return Part("", self.calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _step(self, parts: list[Part]) -> bool:
        """Go on; False where more text is needed."""
        if self._state == "text":
            return self._text(parts)
        if self._state == "name":
            return self._name(parts)
        if self._state == "arguments":
            return self._arguments(parts)
        closing = self._form.after_arguments()
        if len(self._held) < len(closing):
            return False
        self._held, self._state = self._held[len(closing) :], "text"
        return True

    def _name(self, parts: list[Part]) -> bool:
        """Up to the arguments of a function that there is; of another one, and of what has no arguments, it is a text."""
        for name, written in self._written():
            if self._held.startswith(written):
                parts.append(self._begin(name))
                self._held, self._state, self._depth = self._held[len(written) - 1 :], "arguments", 0
                return True
        if any(written.startswith(self._held) for _, written in self._written()):
            return False
        self._state = "text"
        self._held = self._form.before_name() + self._held
        self._release(parts, len(self._form.before_name()))
        return True

    def _written(self) -> Iterator[tuple[str, str]]:
        """The functions, and each as it stands in a call: from its name to the arguments' object."""
        arguments = self._form.before_arguments() + "{"
        for name in self._expected.functions:
            yield name, name + arguments

    def _text(self, parts: list[Part]) -> bool:
        trigger = self._form.before_name()
        if not self._form.opening:  # the answer is a call or has none
            if not self._begun and not self.calls and self._held.startswith(trigger):
                self._held, self._state = self._held[len(trigger) :], "name"
                return True
            waits = not self._begun and not self.calls and trigger.startswith(self._held)
            return False if waits else self._release(parts, len(self._held))
        at = self._held.find(trigger)
        if at >= 0:
            self._release(parts, len(self._held[:at].rstrip()))
            self._held, self._state = self._held.split(trigger, 1)[1], "name"
            return True
        keep = next(
            (n for n in range(min(len(trigger) - 1, len(self._held)), 0, -1) if trigger.startswith(self._held[-n:])), 0
        )
        whole = self._held[: len(self._held) - keep]
        blanks = len(whole) - len(whole.rstrip())  # those before a call are not the answer's
        return self._release(parts, len(whole) - blanks)

    def _release(self, parts: list[Part], count: int) -> bool:
        if count:
            parts.append(Part(self._held[:count]))
            self._held, self._begun = self._held[count:], True
        return False

    def _arguments(self, parts: list[Part]) -> bool:
        """Up to the bracket that closes the object."""
        for place, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    parts.append(Part(self._held[: place + 1], self.calls - 1))
                    self._held, self._state = self._held[place + 1 :], "end"
                    return True
        if self._held:
            parts.append(Part(self._held, self.calls - 1))
            self._held = ""
        return False
