"""Answers that one thread reads piece by piece, in turns and beside whole ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from arriero.engine.answer import Answer
from arriero.errors import GenerationError

if TYPE_CHECKING:
    from arriero.engine.engine import Engine


class Streams:
    """Lets an engine step for whoever waits, and keeps what comes of the others' text for them."""

    def __init__(self) -> None:
        self._unread: dict[Answer, deque[str]] = {}

    def step(self, engine: Engine) -> list[Answer]:
        """The engine's."""
        released = engine.step()
        for answer in released:
            if answer.new_text and answer in self._unread:
                self._unread[answer].append(answer.new_text)
        return released

    def open(self, engine: Engine, answer: Answer) -> Iterator[str]:
        """An answer's text as it comes; the answer is cancelled when nobody holds the iterator any more."""
        pieces = self._pieces(engine, answer)
        next(pieces)  # what has not begun would not end either
        return pieces

    def _pieces(self, engine: Engine, answer: Answer) -> Iterator[str]:
        unread = self._unread[answer] = deque[str]()
        try:
            yield ""
            while unread or answer.finish_reason is None:
                if unread:
                    yield unread.popleft()
                else:
                    self.step(engine)
            if answer.finish_reason == "error":
                raise GenerationError(answer.error)
        finally:
            del self._unread[answer]
            engine.cancel(answer)
