"""What is told of the rows that a run learns from or is scored on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class EncodingReport:
    """What happened to the rows: nothing is cut or dropped without being counted here."""

    rows: int = 0
    truncated_context: int = 0
    truncated_target: int = 0
    empty_target: int = 0
    unlearned: int = 0
    spelled: str = ""  # of control tokens that bare texts spell out; see `SpelledTokens`
    bare: int = 0  # instructions and prompts that are text because of their keys, not because an option says so
    formats: Counter[str] = field(default_factory=Counter)  # rows by format, as far as their keys told it
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens ({self.label_tokens:,} learned), longest {self.longest:,}"
        if self.truncated_context:
            text += f"; {self.truncated_context:,} contexts cut to fit src_length"
        if self.truncated_target:
            text += f"; {self.truncated_target:,} answers cut to fit tgt_length"
        if self.mixed:
            text += f"; {self.mixed}"
        if self.empty_target:
            text += f"; warning: {self.empty_target:,} rows have an empty answer: only its end is learned"
        if self.unlearned:
            text += f"; warning: {self.unlearned:,} rows have nothing that is learned"
        if self.spelled:
            text += f"; warning: {self.spelled}"
        return text

    @property
    def mixed(self) -> str:
        """The rows by format, where there are several."""
        if len(self.formats) < 2:
            return ""
        return "rows by format: " + ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common())

    @property
    def hint(self) -> str:
        """What to say of `bare` rows for a model with a chat template."""
        return (
            f"{self.bare:,} rows are bare text, while chat and serve ask through the model's chat template: rows with "
            "`messages` use it too, and those with `instruction` by --data_format alpaca"
        )
