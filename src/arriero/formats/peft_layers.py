"""Which layers an adapter is on where PEFT's configuration says more than `target_modules`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from arriero.errors import FormatError
from arriero.formats.module_patterns import MAX_NAMES, is_pattern

LAYER_KEYS = frozenset({"layers_to_transform", "layers_pattern", "exclude_modules"})


def check_layer_keys(values: Mapping[str, Any], source: str) -> bool:
    """Whether one of the keys chooses among the layers that `target_modules` names.

    Raises:
        FormatError: for a value that none of them can have.
    """
    indexes, patterns, excluded = (
        values.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules")
    )
    numbers = indexes if isinstance(indexes, list) else [] if indexes is None else [indexes]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise FormatError(f"{source}: layers_to_transform must be numbers of layers, got {str(indexes)[:40]!r}")
    if numbers and isinstance(values.get("target_modules"), str):
        raise FormatError(f"{source}: layers_to_transform does not go with target_modules that is an expression")
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in _listed(patterns)):
        raise FormatError(f"{source}: layers_pattern must be names, got {str(patterns)[:40]!r}")
    ok = is_pattern(excluded) if isinstance(excluded, str) and excluded else True
    if not ok or not all(isinstance(name, str) for name in _listed(excluded)):
        raise FormatError(f"{source}: exclude_modules must be names or an expression, got {str(excluded)[:40]!r}")
    return bool(numbers or excluded)


def stored_layers(
    values: Mapping[str, Any], target_modules: tuple[str, ...] | str, layers: Collection[str], source: str
) -> tuple[str, ...]:
    """The adapted layers' full names: those that are stored, after a look whether PEFT takes them all.

    Raises:
        FormatError: for one that PEFT would leave out.
    """
    if len(layers) > MAX_NAMES:
        raise FormatError(f"{source}: is for {len(layers):,} layers; no model has more than {MAX_NAMES:,}")
    for name in layers:
        if not _is_target(target_modules, name) or _is_excluded(values, name) or not _is_chosen(values, name):
            raise FormatError(
                f"{source}: holds {name}, which target_modules, layers_to_transform and exclude_modules of its configuration "
                "leave out"
            )
    return tuple(sorted(layers))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _is_target(target_modules: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, name) is not None
    return _ends_so(target_modules, name)


def _is_excluded(values: Mapping[str, Any], name: str) -> bool:
    excluded = values.get("exclude_modules") or ()
    return re.fullmatch(excluded, name) is not None if isinstance(excluded, str) else _ends_so(excluded, name)


def _is_chosen(values: Mapping[str, Any], name: str) -> bool:
    """By its number, which is the first in the name, or the one after a `layers_pattern`."""
    indexes = values.get("layers_to_transform")
    if indexes is None or indexes == []:
        return True
    patterns = _listed(values.get("layers_pattern"))
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((found for found in (re.match(expression, name) for expression in expressions) if found), None)
    return match is not None and int(match[1]) in (indexes if isinstance(indexes, list) else [indexes])


def _ends_so(names: Collection[str], name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in names)


def targets_of(layers: Collection[str], depth: int | None) -> tuple[str, ...]:
    """`target_modules` for these adapted layers: the last parts of their names if they are all that end so, else all of them.

    Args:
        depth: layers of the decoder; None, if it is not known, is taken for as many as there are adapted ones.
    """
    decoder = [name for name in layers if name.startswith("model.layers.")]
    numbers = {int(name.split(".")[2]) for name in decoder}
    kinds = {name.rpartition(".")[2] for name in layers}
    wanted = len(numbers) if depth is None else depth
    whole = numbers <= set(range(wanted)) and len(decoder) == wanted * len(
        {name.rpartition(".")[2] for name in decoder}
    )
    return tuple(sorted(kinds if whole else layers))
