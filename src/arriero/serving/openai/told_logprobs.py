"""Which log-probabilities a client of /v1/chat/completions gets: those of what it is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from arriero.data.assistant_turns import THOUGHT_CLOSING
from arriero.engine.logprobs import TokenLogprobs
from arriero.serving.openai.call_reader import Part
from arriero.serving.openai.token_text import TokenTexts, chat_logprobs


class ToldLogprobs:
    """Of one answer, given out with its parts: tokens that begin in what is said, or in a thought that is told, with its marks.

    Tokens of a stop string, of the answer's end, of calls and of a thought that is not told are not among them.
    """

    def __init__(self, texts: TokenTexts, *, tells_thoughts: bool) -> None:
        self._texts, self._offsets, self._tells_thoughts = texts, texts.offsets(), tells_thoughts
        self._waiting: deque[tuple[int, int, TokenLogprobs]] = deque()  # each with the place where it begins
        self._told, self._thought, self._called = 0, False, False

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """The answer's next tokens."""
        for token, found in zip(tokens, logprobs, strict=True):
            self._waiting.append((self._offsets.next(token), token, found))

    def take(self, part: Part) -> dict[str, Any] | None:
        """`logprobs` of the next part; None: it has none."""
        if part.thought:
            self._thought = True
            return self._up_to(self._told + len(part.text)) if self._tells_thoughts else None
        before: list[tuple[int, TokenLogprobs]] = []
        if part.passed:  # the marks and blanks after a thought, or all of one that is not told
            before = self._until(part.passed)
        self._called = self._called or part.call is not None
        said = [] if self._called else self._until(self._told + len(part.text))
        return self._object([*(before if self._thought and self._tells_thoughts else []), *said])

    def end(self, text: str) -> dict[str, Any] | None:
        """Of the end of a thought with which the answer ended.

        Args:
            text: the whole answer's.
        """
        thought, mark, _ = text.partition(THOUGHT_CLOSING)
        return self._up_to(len(thought + mark)) if self._thought and self._tells_thoughts else None

    def whole(self, parts: Sequence[Part], text: str) -> dict[str, Any]:
        """Of an answer that is given whole."""
        found = [*(self.take(part) for part in parts), self.end(text)]
        return {"content": [entry for one in found if one is not None for entry in one["content"]], "refusal": None}

    def _up_to(self, place: int) -> dict[str, Any] | None:
        return self._object(self._until(place))

    def _until(self, place: int) -> list[tuple[int, TokenLogprobs]]:
        """The tokens that begin before it in the answer's text."""
        self._told, found = max(self._told, place), []
        while self._waiting and self._waiting[0][0] < self._told:
            found.append(self._waiting.popleft()[1:])
        return found

    def _object(self, found: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any] | None:
        tokens, logprobs = [token for token, _ in found], [own for _, own in found]
        return chat_logprobs(self._texts, tokens, logprobs) if found else None
