"""Finds in an answer, while it grows, what is thought, what is said, and which tools are called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from arriero.engine.answer import Generation
from arriero.engine.structure import Thought
from arriero.serving.openai.call_reader import CallReader, Calls, Part
from arriero.serving.openai.thinking import ThoughtReader


class AnswerReader:
    """Takes an answer's text piece by piece."""

    def __init__(self, calls: Calls | None, thought: Thought = "none") -> None:
        """
        Args:
            calls: those that it may hold; None where there are no tools.
            thought: where it thinks first.
        """
        self._thoughts = ThoughtReader(thought)
        self._calls = CallReader(calls) if calls is not None else None
        self._passed = False

    @property
    def calls(self) -> int:
        """How many have begun."""
        return self._calls.calls if self._calls is not None else 0

    @property
    def speechless(self) -> bool:
        """Whether there is no text because the answer calls tools, or ended before it was known what it would become."""
        left_out = self._calls is not None and (self._calls.calls > 0 or self._calls.left_out)
        return left_out or self._thoughts.thinking

    def push(self, text: str, end: Generation | None = None) -> list[Part]:
        """What can be told now.

        Args:
            end: the answer that ends with this text.
        """
        thought, rest = self._thoughts.push(text)
        if end is not None:
            last = self._thoughts.finish()
            thought, rest = thought + last[0], rest + last[1]
        parts = [Part(thought, thought=True)] if thought else []
        if self._calls is None:
            said = [Part(rest)] if rest else []
        else:
            said = self._calls.push(rest)
            if end is not None:
                said += self._calls.finish(cut=end.finish_reason != "stop")
        if said and not self._passed:
            self._passed = True
            said[0] = replace(said[0], passed=self._thoughts.passed)
        return parts + said


@dataclass
class Message:
    """A whole answer.

    Attributes:
        content: what is said; None if nothing is, by intent.
        thought: what was thought before.
        calls: of tools, as OpenAI's API has them.
    """

    content: str | None
    thought: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, calls: Calls | None, answer: Generation, thought: Thought = "none") -> Message:
        """Of an answer; the arguments are those of `AnswerReader`.

        Of one that was cut, the last call is as much of it as is known.
        """
        reader, content = AnswerReader(calls, thought), ""
        message = cls(None)
        for part in reader.push(answer.text, answer):
            if part.thought:
                message.thought += part.text
            elif part.call is None:
                content += part.text
            elif part.name is not None:
                function = {"name": part.name, "arguments": ""}
                message.calls.append({"id": part.id, "type": "function", "function": function})
            else:
                message.calls[part.call]["function"]["arguments"] += part.text
        message.content = (content or None) if reader.speechless else content
        return message
