"""Talking to a model in the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class ChatOptions(OptionGroup):
    """Chat."""

    system: str | None = option(None, "a system message put before the conversation")
    prompt: str | None = option(None, "answer this one message and leave")
