"""Text of JSON files."""

from __future__ import annotations

import json

from arriero.errors import FormatError


def check_text(values: object, source: str) -> None:
    """Raises FormatError for half of a surrogate pair in a JSON file: it is no text and cannot be written back."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:
        raise FormatError(f"{source}: holds half of a surrogate pair, which is no text; fetch it again") from error
