"""Text of strangers for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text without what would steer a terminal or mislead its reader: such characters are shown as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
