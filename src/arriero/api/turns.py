"""One model, several threads: whoever uses it waits for the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from types import TracebackType


class Turns:
    """`with turns:` has the model to itself, and is not to be entered again within. A stream takes a turn for each piece, so
    that others get theirs between two."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[Generator[str]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._close_left()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def end(self, pieces: Generator[str]) -> None:
        """Cancel a stream: now, or where the model is in use (the garbage collector may call this in the midst of a step)
        before its next use."""
        self._left.append(pieces)
        if self._lock.acquire(blocking=False):
            try:
                self._close_left()
            finally:
                self._lock.release()

    def _close_left(self) -> None:
        while self._left:
            self._left.popleft().close()


class Stream(Iterator[str]):
    """The pieces of an answer, for any threads; it ends with `close`, or when nobody holds it any more."""

    def __init__(self, turns: Turns, pieces: Generator[str]) -> None:
        self._turns, self._pieces = turns, pieces

    def __next__(self) -> str:
        with self._turns:
            return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._turns.end(self._pieces)

    def __del__(self) -> None:
        self.close()
