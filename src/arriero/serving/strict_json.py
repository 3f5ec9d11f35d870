"""The JSON of clients, with limits of its own: what it can cost is known before anything looks into it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from arriero.serving.api_errors import ApiError

MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # numbers, strings, lists and objects in all


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400, for anything else: no UTF-8, NaN, half a surrogate pair, nested too deeply, too many values.
    """
    try:
        value = _decoder.decode(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise _malformed(f"it is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise _malformed(" ".join(str(error).split())[:200]) from error
    if not isinstance(value, dict):
        raise _malformed("it must be an object")
    _check(value)
    return value


def parse_value(text: str) -> Any:
    """Any JSON of a client; None if it is none, or one that `parse_object` would refuse."""
    try:
        value = _decoder.decode(text)
        _check(value)
    except (ApiError, ValueError, RecursionError):
        return None
    return value


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"the body of the request is not valid JSON: {reason}", code="invalid_json")


def _check(value: Any) -> None:
    """Depth, size and characters, level by level."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise _malformed(f"it has more than {MAX_VALUES} values")
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                following += item.values()
            elif isinstance(item, list):
                following += item
        if not following:
            return
        level = following
    raise _malformed(f"it is nested more than {MAX_DEPTH} deep")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _malformed("it holds half a surrogate pair, which is no character") from error
