"""How many tokens a training row has for its prompt, its answer and both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """Bounds of a row, in tokens.

    Attributes:
        longest_prompt: whatever the answer leaves.
        longest_answer: whatever the prompt leaves.
        both: of the two together; None: the sum of their own.
    """

    longest_prompt: int
    longest_answer: int
    both: int | None = None

    @property
    def row(self) -> int:
        """The longest row."""
        own = self.longest_prompt + self.longest_answer
        return own if self.both is None else min(own, self.both)

    @property
    def answer(self) -> int:
        """What is kept for an answer beside a prompt that is too long: all that it may have, if that is less than a row, else
        what the longest prompt leaves; a third where that may be a row too.
        """
        if self.longest_answer < self.row:
            return self.longest_answer
        return self.row - self.longest_prompt if self.longest_prompt < self.row else max(1, self.row // 3)

    @property
    def prompt(self) -> int:
        """What is kept for a prompt beside an answer that is too long."""
        return min(self.longest_prompt, self.row - self.answer)
