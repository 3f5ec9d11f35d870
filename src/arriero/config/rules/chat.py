"""Rules about `chat`, which answers one message after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.config.chat import ChatOptions
from arriero.config.generation import GenerationOptions
from arriero.config.rules.groups import changed, find


def chat_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    generation = find(groups, GenerationOptions)
    if find(groups, ChatOptions) is not None and generation is not None and changed(generation, "batch_size", given):
        warnings.append("--batch_size has no effect in chat, which answers one message at a time")
