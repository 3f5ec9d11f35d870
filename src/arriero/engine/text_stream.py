"""An answer's text while it grows, with stop strings that may lie across tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from arriero.data.stream_decoder import StreamDecoder


class TextStream:
    """Gives out text as soon as no stop string can begin in it any more.

    Attributes:
        text: all that was given out.
        stopped: whether a stop string was met; nothing is given out from its beginning on.
    """

    def __init__(
        self, decoder: StreamDecoder, stop_strings: Sequence[str] = (), stop_tokens: Collection[int] = ()
    ) -> None:
        """
        Args:
            stop_tokens: those that count as a stop string, such as the special token that one of them is the name of.
        """
        self._decoder, self._stop_tokens = decoder, stop_tokens
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        self._held = ""
        self._passed = 0  # characters of the held text in which a stop string that ends there is ordinary text
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
        if may_stop and token_id in self._stop_tokens:
            text = self.finish()
            self.stopped = True
            return text
        self._held += self._decoder.push(token_id)
        return self._release(may_stop, final=False)

    def finish(self, *, may_stop: bool = True) -> str:
        """The text still held back when there are no more tokens."""
        self._held += self._decoder.flush()
        return self._release(may_stop, final=True)

    def _release(self, may_stop: bool, final: bool) -> str:
        if self.stopped or not self._held:
            return ""
        if not may_stop:
            self._passed = len(self._held)
        starts = {stop: max(0, self._passed - len(stop) + 1) for stop in self._stop_strings}
        found = [at for stop, start in starts.items() if (at := self._held.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_beginning()
            text = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        self._passed = max(0, self._passed - len(text))
        if text:
            self._parts.append(text)
        return text

    def _possible_beginning(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0
