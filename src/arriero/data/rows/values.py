"""Values of a row, checked: a message names the row and the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.errors import DataError

Row = Mapping[str, Any]
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def kind_of(value: Any) -> str:
    """What a value is in JSON, for messages."""
    return _KINDS.get(type(value), "something else")


def keys_of(row: Row) -> str:
    """The keys of a row, for messages."""
    return ", ".join(map(str, row))[:200] or "nothing"


def given_keys(row: Row) -> set[str]:
    """The keys of a row whose values are not null: tables of mixed rows have null in the columns of the other rows."""
    return {key for key, value in row.items() if value is not None}


def one_key(row: Row, keys: tuple[str, ...], where: str) -> str:
    """Which of several keys for the same thing a row has; the first where it has none of them.

    Raises:
        DataError: it has more than one.
    """
    given = [key for key in keys if row.get(key) is not None]
    if len(given) > 1:
        raise DataError(f"{where}: has {' and '.join(map(repr, given))}, two keys for the same: keep one of them")
    return given[0] if given else keys[0]


def first_text(row: Row, key: str, where: str) -> str:
    """The string under `key`, or the first one of a list of strings.

    Raises:
        DataError: there is none.
    """
    value = row.get(key)
    if value is None or value == []:
        raise DataError(f"{where}: has no '{key}': add it, or leave out this row")
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string or a list that starts with one, found {kind_of(value)}")
    return value


def answer_text(row: Row, key: str, where: str, needed: bool) -> str | None:
    """The answer under `key`; None where a row need not have one and has none.

    Raises:
        DataError: it is needed and missing.
    """
    return first_text(row, key, where) if needed or row.get(key) is not None else None


def optional_text(row: Row, key: str, where: str) -> str:
    """The string under `key`, "" where it is missing or null.

    Raises:
        DataError: it is something else.
    """
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, found {kind_of(value)}")
    return value
