"""Talking to a model in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arriero.config.generation import GenerationOptions
from arriero.config.option import OptionGroup, option
from arriero.config.template_variables import parse_variables

USUAL_LENGTH = 256  # tokens of an answer whose length is not told


@dataclass(kw_only=True)
class ChatGenerationOptions(GenerationOptions):
    """Generation."""

    max_new_tokens: int = option(
        0,
        f"longest answer in tokens; 0: {USUAL_LENGTH}, where the context has that room",
        aliases=("tgt_length", "max_length"),
        minimum=0,
    )

    def _check_lengths(self) -> None:
        if self.max_new_tokens:
            super()._check_lengths()


@dataclass(kw_only=True)
class ChatOptions(OptionGroup):
    """Chat."""

    system: str | None = option(None, "a system message put before the conversation")
    prompt: str | None = option(None, "answer this one message and leave")
    chat_template_kwargs: str | None = option(
        None, 'what the chat template is told, as a JSON object, such as {"enable_thinking": false}'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.template_variables

    @property
    def template_variables(self) -> dict[str, Any]:
        """Of `--chat_template_kwargs`.

        Raises:
            ConfigError: it is no JSON object, or names what is not to be set.
        """
        return parse_variables(self.chat_template_kwargs, "--chat_template_kwargs") if self.chat_template_kwargs else {}
