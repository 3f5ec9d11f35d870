"""Answers that are JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from arriero.serving.api_errors import ApiError


def dump(value: Any) -> bytes:
    """Compact UTF-8 JSON. NaN, which is none, is refused."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON object as an answer."""
    return Response(dump(value), status, dict(headers or {}), media_type="application/json")


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """An error as an answer."""
    return json_response(error.body, error.status, {**error.headers, **(headers or {})})
