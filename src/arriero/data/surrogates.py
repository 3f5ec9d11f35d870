"""Halves of surrogate pairs, which JSON and file names can carry and no encoding can: they become U+FFFD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_surrogates(text: str) -> str:
    """The text; two halves that make a pair become its character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def all_without_surrogates(value: Any) -> Any:
    """The same of every text in JSON-like data."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {all_without_surrogates(key): all_without_surrogates(item) for key, item in value.items()}
    return [all_without_surrogates(item) for item in value] if isinstance(value, list | tuple) else value
