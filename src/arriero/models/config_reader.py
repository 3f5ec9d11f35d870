"""Typed access to the values of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.errors import FormatError

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class ConfigReader:
    """Typed access to a config.json; null counts as absent. Messages name the file, the key and the value."""

    values: Mapping[str, Any]
    source: str

    def _wrong(self, key: str, expected: str) -> FormatError:
        return FormatError(f"{self.source}: {key} must be {expected}, got {repr(self.values[key])[:_SHOWN]}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise FormatError(f"{self.source}: {key} is missing; a model configuration needs it")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self._wrong(key, "a number that a computer has") from None

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def string(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def token_id(self, key: str, default: int | None) -> int | None:
        """One id, or None; a negative one (old LLaMA files say -1) means none."""
        if key not in self.values:
            return default
        value = self.values[key]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a token id or null")
        return value if value >= 0 else None

    def token_ids(self, key: str, default: int | None) -> int | list[int] | None:
        """One id, several, or None."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return self.token_id(key, default)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
            raise self._wrong(key, "a token id, a list of them, or null")
        return list(value)
