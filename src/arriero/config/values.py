"""From the text of a flag or the value of a YAML / JSON key to the type of an option, strictly."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from arriero.config.option import OptionSpec
from arriero.errors import ConfigError

TRUE_WORDS = frozenset({"1", "true", "t", "yes", "y", "on"})
FALSE_WORDS = frozenset({"0", "false", "f", "no", "n", "off"})
_NONE_WORDS = frozenset({"none", "null"})
_MAX_SHOWN = 80
# Options whose text is a path, or may be one: `~` in it is the home folder, as a shell has it on a command line.
_PATH_ENDS = ("_path", "_dir", "_file", "_prefix", "_certfile", "_keyfile")
_PATHS = frozenset(
    ("adapter_folder", "adapters", "base_model", "config_name", "data_cache", "draft_model", "model", "path", "plot")
    + ("resume_from_checkpoint", "sample_prompts")
)

KIND_NAMES: dict[type, str] = {
    bool: "yes or no (1/0, true/false)",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def show(value: Any) -> str:
    """A short, safe rendering of a value a user gave (a container could be huge: only its kind is named)."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def nearest(word: str, known: list[str]) -> str | None:
    """The known name most like a word, or None if nothing is near."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return matches[0] if matches else None


def step_range(text: str) -> tuple[int, int] | None:
    """The first and last step of `5` or `5-8`, counted from 1; None if it is no such text."""
    match = re.fullmatch(r"\s*(\d{1,12})\s*(?:-\s*(\d{1,12})\s*)?", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return (first, last) if 1 <= first <= last else None


def convert(spec: OptionSpec, value: Any, where: str) -> Any:
    """The typed value of an option.

    Args:
        spec: the option.
        value: a string (or a list of strings) from the command line, or any scalar or list from a file.
        where: how to name the place in an error, e.g. `--learning_rate` or `run.yaml: learning_rate`.

    Raises:
        ConfigError: the value is not of the option's type, or not one of its choices.
    """
    if value is None:
        if spec.optional:
            return None
        raise ConfigError(f"{where} has no value: it takes {_expected(spec)}")
    if not spec.is_list:
        return _convert_item(spec, value, where)
    items = value if isinstance(value, list) else [value]
    words: list[Any] = []
    for item in items:
        if spec.split and isinstance(item, str):
            words.extend(word for word in re.split(r"[,\s]+", item) if word)
        else:
            words.append(item)
    return [_convert_item(spec, word, where) for word in words]


def _expected(spec: OptionSpec) -> str:
    if spec.choices is not None:
        return f"one of {', '.join(spec.choices)}"
    return KIND_NAMES[spec.kind]


def _convert_item(spec: OptionSpec, value: Any, where: str) -> Any:
    if (
        spec.optional
        and not spec.is_list
        and spec.kind in (bool, int, float)
        and isinstance(value, str)
        and value.strip().lower() in _NONE_WORDS
    ):
        return None
    converted = _CONVERTERS[spec.kind](spec, value)
    if converted is None:
        raise ConfigError(f"{where} takes {_expected(spec)}, not {show(value)}")
    return converted


def _to_bool(spec: OptionSpec, value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        word = str(value).strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
    return None


def _to_int(spec: OptionSpec, value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
        return int(value)
    return None


def _to_float(spec: OptionSpec, value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)  # a string from a file too: YAML 1.1 reads 3e-4 (no dot) as one
    except (ValueError, OverflowError):
        return None


def _to_text(spec: OptionSpec, value: Any) -> str | None:
    if isinstance(value, bool):
        # YAML 1.1 reads a bare `no` or `off` as a boolean: give the word back where it is one of the choices.
        words = TRUE_WORDS if value else FALSE_WORDS
        return next((choice for choice in spec.choices or () if choice.lower() in words), None)
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str):
        return None
    if spec.choices is None:
        return _at_home(value) if spec.name in _PATHS or spec.name.endswith(_PATH_ENDS) else value
    return next((choice for choice in spec.choices if choice.lower() == value.strip().lower()), None)


def _at_home(text: str) -> str:
    """With `~` and `~user` expanded at the start of each path: `PATH`, `PATH,PATH:WEIGHT` or `NAME=PATH`."""
    return re.sub(r"(^|[,=]\s*)(~[^,]*)", lambda found: found[1] + os.path.expanduser(found[2]), text)


def _to_path(spec: OptionSpec, value: Any) -> Path | None:
    return Path(os.path.expanduser(value)) if isinstance(value, str) and value else None


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text, Path: _to_path}
