"""Text of strangers for a terminal."""

from __future__ import annotations

import sys

# C0 but line breaks and tabs, DEL and C1
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A text without what would steer a terminal or mislead its reader: such characters are shown as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def without_controls(text: str) -> str:
    """A text of several lines as it is printed: if that is to a terminal, nothing in it steers the terminal."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text
