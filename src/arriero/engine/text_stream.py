"""An answer's text while it grows, with stop strings that may lie across tokens."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.data.stream_decoder import StreamDecoder


class TextStream:
    """Gives out text as soon as no stop string can begin in it any more.

    Attributes:
        text: all that was given out.
        stopped: whether a stop string was met; nothing is given out from its beginning on.
    """

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._parts)

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that this token releases.

        Args:
            may_stop: false: a stop string that this token completes is ordinary text.
        """
        self._held += self._decoder.push(token_id)
        return self._release(may_stop, final=False)

    def finish(self, *, may_stop: bool = True) -> str:
        """The text still held back when there are no more tokens."""
        self._held += self._decoder.flush()
        return self._release(may_stop, final=True)

    def _release(self, may_stop: bool, final: bool) -> str:
        if self.stopped or not self._held:
            return ""
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0] if may_stop else []
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_beginning()
            text = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        if text:
            self._parts.append(text)
        return text

    def _possible_beginning(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0
