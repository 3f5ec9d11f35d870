"""What a model thinks before it answers, between <think> and </think>, as DeepSeek-R1 and Qwen3 write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from arriero.data.assistant_turns import THOUGHT_CLOSING, THOUGHT_OPENING
from arriero.data.tokenizer import Tokenizer
from arriero.engine.structure import Thought

TAIL = 16  # tokens of a prompt's end in which a thought can begin or end


def thought_of(tokenizer: Tokenizer, prompt: Sequence[int], *, continued: str | None = None) -> Thought:
    """Where an answer to this prompt thinks.

    Args:
        continued: the message in the prompt with which the answer goes on.
    """
    if not any(THOUGHT_CLOSING in (source or "") for source in (tokenizer.chat_template, tokenizer.tool_template)):
        return "none"
    end = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
    if end.endswith(THOUGHT_OPENING):
        return "open"
    if continued is not None:
        within = continued.lstrip().startswith(THOUGHT_OPENING) and THOUGHT_CLOSING not in continued
        return "open" if within else "none"
    return "none" if end.endswith(THOUGHT_CLOSING) else "may"


@dataclass(frozen=True)
class ThoughtTokens:
    """Counts the tokens of thoughts.

    Attributes:
        thought: where answers think.
        opening, closing: the ids of the marks; None where they are not one token each, and nothing is counted.
    """

    thought: Thought
    opening: int | None
    closing: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, thought: Thought) -> ThoughtTokens:
        """Of a model's answers."""
        return cls(thought, tokenizer.token_to_id(THOUGHT_OPENING), tokenizer.token_to_id(THOUGHT_CLOSING))

    def count(self, answer: Sequence[int]) -> int:
        """How many of an answer's tokens are its thought, with the marks."""
        if self.thought == "none" or self.closing is None:
            return 0
        if self.thought == "may" and self.opening not in answer[:2]:  # a line break may come first
            return 0
        return answer.index(self.closing) + 1 if self.closing in answer else len(answer)


class ThoughtReader:
    """Parts an answer's text into thought and rest, piece by piece, without the marks and the blanks around them.

    Attributes:
        thinking: whether the text is within a thought.
        passed: characters up to the rest's beginning that are no part of it.
    """

    def __init__(self, thought: Thought) -> None:
        self._state: Literal["start", "thought", "gap", "rest"] = "start"
        if thought != "may":
            self._state = "thought" if thought == "open" else "rest"
        self._held, self._begun, self._pushed = "", False, 0
        self.passed = 0

    @property
    def thinking(self) -> bool:
        """Whether the thought has begun and not ended."""
        return self._state == "thought"

    def push(self, text: str) -> tuple[str, str]:
        """What can be told now: of the thought, of the rest."""
        self._held += text
        self._pushed += len(text)
        thought = ""
        if self._state == "start":
            begin = self._held.lstrip()
            if begin.startswith(THOUGHT_OPENING):
                self._held, self._state = begin[len(THOUGHT_OPENING) :], "thought"
            elif not THOUGHT_OPENING.startswith(begin):
                self._state = "rest"
        if self._state == "thought":
            thought = self._think()
        if self._state == "gap":
            self._held = self._held.lstrip()
            self._state, self.passed = ("rest" if self._held else "gap"), self._pushed - len(self._held)
        if self._state != "rest":
            return thought, ""
        rest, self._held = self._held, ""
        return thought, rest

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        if self.thinking:
            return held.strip() if not self._begun else held.rstrip(), ""
        return "", held if self._state == "start" else ""

    def _think(self) -> str:
        """Up to the mark at the thought's end, or as far as the text cannot be its beginning."""
        if not self._begun:
            self._held = self._held.lstrip()
        told, found, rest = self._held.partition(THOUGHT_CLOSING)
        if found:
            self._held, self._state = rest, "gap"
            return told.rstrip()
        keep = next((n for n in range(len(THOUGHT_CLOSING) - 1, 0, -1) if told.endswith(THOUGHT_CLOSING[:n])), 0)
        whole = told[: len(told) - keep].rstrip()  # blanks before the mark are not the thought's
        self._held = told[len(whole) :]
        self._begun = self._begun or bool(whole)
        return whole
