"""Tokens on top of a model's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class VocabularyOptions(OptionGroup):
    """New tokens."""

    add_tokens: list[str] = option(
        [], "new ordinary tokens: the tokenizer gets them, the model a row for each, the mean of the rows it has"
    )
    add_special_tokens: list[str] = option(
        [], "the same for control tokens, which the chat template may write and the text of a row never becomes"
    )
    resize_vocab: bool = option(
        False, "give the model rows for the tokens that the tokenizer (--tokenizer_name_or_path) has more"
    )
    pad_vocab_to_multiple_of: int | None = option(
        None, "round the number of rows up to a multiple of this; 64 suits matrix units", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("add_tokens", "add_special_tokens"):
            tokens = getattr(self, name)
            if any(not token.strip() for token in tokens):
                raise ConfigError(f"--{name} has an empty token: a token needs at least one letter")
            setattr(self, name, list(dict.fromkeys(tokens)))
        both = set(self.add_tokens) & set(self.add_special_tokens)
        if both:
            raise ConfigError(
                f"--add_tokens and --add_special_tokens both name {min(both)!r}: a token is one or the other"
            )

    @property
    def changes(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.add_tokens or self.add_special_tokens or self.resize_vocab or self.pad_vocab_to_multiple_of)

    def rows(self, held: int, tokens: int) -> int:
        """The rows of embedding and head: those that the model holds, more where the tokenizer has more tokens, and then
        rounded up."""
        multiple = self.pad_vocab_to_multiple_of or 1
        return -(-max(held, tokens) // multiple) * multiple
