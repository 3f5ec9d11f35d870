"""Fine-tuning rows before tokenisation: what is asked, what is to be answered, and which part may be shortened.

Every reader in `arriero.data.rows` makes a `Sample`; what follows (cutting, labels, reports, scores) knows nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


def _user() -> Message:
    return {"role": "user"}


@dataclass(frozen=True)
class Sample:
    """One row.

    The prompt is ``before + context + after``; only `context` is shortened when the row is too long.

    Attributes:
        target: the answer that is learned and scored; None where a row only asks.
        chat: the prompt is a turn and goes through the chat template, if the tokenizer has one.
        ends_prompt: the prompt is closed with the end-of-sequence token (PaddleNLP's question generation).
        history: earlier turns of a conversation; assistant turns among them are learned too.
        turn: what the prompt's own turn says besides its content: {"role": "user"}, or that it is a tool's answer.
        answer: the answer as a turn, where it is more than its text (tool calls): the template writes it.
        tools: JSON schemas of the functions that the assistant may call, for the template.
        plain: (before, after) that replace those of the prompt where no chat template writes the turns.
        references: answers that count as right when a metric is computed.
        source: number of the data set it is from, where several are mixed.
        where: file and line, for messages.
        told: the format that the row's keys told; "" where --data_format named it.
        stripped: its format leaves the blanks around the answer out (PaddleNLP's formats do).
    """

    before: str
    context: str
    after: str
    target: str | None
    chat: bool = False
    ends_prompt: bool = False
    history: tuple[Message, ...] = ()
    turn: Message = field(default_factory=_user)
    answer: Message | None = None
    tools: tuple[Message, ...] = ()
    plain: tuple[str, str] | None = None
    references: tuple[str, ...] = ()
    id: str = ""
    source: int = 0
    where: str = ""
    told: str = field(default="", compare=False)
    stripped: bool = field(default=False, compare=False)

    @property
    def prompt(self) -> str:
        return self.before + self.context + self.after

    @property
    def only_text(self) -> bool:
        """Whether there is no prompt: a text that is learned from its first word."""
        return not (self.chat or self.history or self.prompt)

    @property
    def name(self) -> str:
        """How a message names the row."""
        return self.where or (f"row {self.id}" if self.id else f"the row {self.prompt[:40]!r}")
