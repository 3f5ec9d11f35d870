"""Text as it is generated, token by token, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "�"


class StreamDecoder:
    """Decodes incrementally: what `push` and `flush` return adds up to the decoding of all tokens.

    A byte-level token may end inside a UTF-8 sequence, and a token's text may depend on the one before (a leading space is
    dropped at the start only). So a short window of recent tokens is decoded anew each time, and the text is held back
    while it ends in a replacement character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # first token of the window
        self._emitted = 0  # tokens already turned into text; the window starts at or before it

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps empty."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._emitted])
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The rest, an unfinished character as U+FFFD."""
        before = self._decode(self._ids[self._window : self._emitted])
        text = self._decode(self._ids[self._window :])
        self._window = self._emitted = len(self._ids)
        return text[len(before) :]
