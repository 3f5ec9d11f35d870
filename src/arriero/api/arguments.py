"""Arguments of the Python functions that are no options: checked, and as plain values."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError


def path_text(name: str, value: Any, what: str) -> str:
    """A path or a name as text.

    Raises:
        ConfigError: it is something else, or empty; `what` says what is to be given.
    """
    if isinstance(value, str | PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text.strip():
            return text
        raise ConfigError(f"{name} is empty: give {what}")
    if hasattr(value, "folder"):
        raise ConfigError(f"{name} is a loaded {type(value).__name__}: give its folder, {name}.folder")
    raise ConfigError(f"{name} is {_shown(value)}: give {what}")


def path_of(name: str, value: Any, what: str = "a folder") -> Path:
    """The same as a path, with `~` resolved."""
    return Path(os.path.expanduser(path_text(name, value, what)))


def model_name(value: Any) -> str:
    """What a function was given as `model`, where it takes no loaded one."""
    return path_text("model", value, "a folder, a named model or a Hub id")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """
    Raises:
        ConfigError: another kind of value, or one below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}: it must be a whole number")
    if value < least:
        raise ConfigError(f"{name} is {value}: it must be at least {least}")
    return value


def plain(value: Any) -> Any:
    """A torch.dtype or torch.device by its name, as options have it; anything else as it is. Imports no torch."""
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"of type {type(value).__name__}"
