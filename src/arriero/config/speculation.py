"""Guesses of tokens ahead, which the model checks many at a time."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class SpeculationOptions(OptionGroup):
    """Speculation."""

    num_speculative_tokens: int = option(
        0,
        "guess so many tokens ahead, by looking up what followed the same words before; faster where answers repeat their "
        "prompts, and the answers stay the same; 0: off",
        minimum=0,
        maximum=64,
    )
    draft_model: str | None = option(
        None, "a small model with the same tokenizer that makes the guesses instead", only_with="num_speculative_tokens"
    )
