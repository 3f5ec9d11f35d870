"""Messages about options in Python's words: what is `--lora_rank 8` in a shell is lora_rank=8 here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from arriero.api.groups import KEYWORDS, RESERVED
from arriero.config.adapter import AdapterPathOptions
from arriero.config.option import OptionSpec, option_table
from arriero.errors import ArrieroError

# Commands to run in a shell stay as they are.
_COMMAND = r"`[^`]*`|\barriero [a-z]+(?: (?:--[^\s;:,)]+(?: (?!--)[^\s;:,)]+)?|[A-Z][A-Z_]+))+"
_WORDS = re.compile(rf"({_COMMAND})|--([a-z]\w*)(?: ([\w.+-]*\w)(?=[\s;:,.)]|$))?")
_DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}


@contextmanager
def in_python(function: str) -> Iterator[None]:
    """Errors within speak of the keyword arguments of a function of `arriero.api.groups.KEYWORDS`. Also a decorator."""
    try:
        yield
    except ArrieroError as error:
        error.args = (translated(str(error), function), *error.args[1:])
        raise


def translated(message: str, function: str) -> str:
    """A message with options as keyword arguments, named as the function names them."""

    def word(found: re.Match[str]) -> str:
        command, name, value = found.groups()
        spec = None if command else _options().get(name)
        if spec is None:
            return found[0]
        name = _named(spec, name, function)
        if value is None:
            return name
        given = _given(spec, value)
        return f"{name} {value}" if given is None else f"{name}={given}"

    return _WORDS.sub(word, message)


@cache
def _options() -> dict[str, OptionSpec]:
    found: dict[str, OptionSpec] = {}
    for groups in (*KEYWORDS.values(), (AdapterPathOptions,)):
        for name, spec in option_table(groups).items():
            found.setdefault(name, spec)
    return found


def _named(spec: OptionSpec, name: str, function: str) -> str:
    if spec.name == "model_name_or_path" and function != "preprocess":
        return "model"
    if spec.name in ("lora_path", "prefix_path") and (spec.name in RESERVED[function] or function == "load"):
        return "adapter"
    return name


def _given(spec: OptionSpec, value: str) -> str | None:
    """A value after an option's name as Python writes it; None for another word of the sentence."""
    if spec.kind is bool:
        return {"yes": "True", "no": "False"}.get(value)
    if spec.kind in (int, float):
        return value if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", value) else None
    choice = _DEVICES.get(value) if spec.name == "device" else value if value in (spec.choices or ()) else None
    return None if choice is None else repr(choice)
