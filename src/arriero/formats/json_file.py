"""A small JSON file of somebody else's: one object, bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.json_text import check_text

MAX_CONFIG_BYTES = 4 * 2**20


def read_json_object(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Args:
        missing: what a message says where the file is missing.

    Raises:
        FormatError: when it is missing, too large or no JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); {missing}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; this is not a configuration")
    return parse_json_object(text, f"{path}:")


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        where: how a message begins.

    Raises:
        FormatError: when it is none.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON; fetch it again") from error
    check_text(values, where.removesuffix(":"))
    if not isinstance(values, dict):
        raise FormatError(f"{where} must hold a JSON object, got {type(values).__name__}")
    return values
