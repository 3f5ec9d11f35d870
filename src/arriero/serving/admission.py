"""How much may be on its way: what is more is refused at once, so that nobody waits in vain."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from arriero.serving.api_errors import ApiError, shutting_down

_MEMORY = 0.9  # of the mean time of an answer: how much of it an answer leaves
LONGEST_RETRY = 60  # seconds
MAX_TEXTS = 8192  # whose vectors are on their way, of all requests together: what they take is memory
RETRY_TEXTS = 5  # seconds


class Admission:
    """Counts answers, and texts whose vectors are asked for, from request to end. For one event loop.

    Attributes:
        draining: no more are let in.
    """

    def __init__(self, running: int, waiting: int) -> None:
        """
        Args:
            running: answers that are computed at once.
            waiting: those that may wait besides; and as many requests for vectors as both together are let in.
        """
        self._running, self._capacity = running, running + waiting
        self._answers = self._texts = self._text_requests = 0
        self.draining = False
        self._mean_seconds = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Answers and requests for vectors on their way."""
        return self._answers + self._text_requests

    def enter(self, answers: int) -> Place:
        """Let a request in that asks for so many answers.

        Raises:
            ApiError: 429: there are too many already; 400: there will never be room; 503: the server is shutting down.
        """
        if self.draining:
            raise shutting_down()
        if answers > self._capacity:
            raise ApiError(
                400,
                f"{answers} answers are asked for in one request: at most {self._capacity} are given here",
                code="too_many",
            )
        if self._answers + answers > self._capacity:
            seconds = self._mean_seconds * (self._answers + answers - self._capacity) / self._running
            raise ApiError(
                429,
                f"{self._answers} answers are on their way and no more may wait: try again later",
                code="queue_full",
                retry_after=min(LONGEST_RETRY, max(1, math.ceil(seconds))),
            )
        self._answers += answers

        def leave(seconds: float) -> None:
            self._answers -= answers
            self._mean_seconds = _MEMORY * self._mean_seconds + (1 - _MEMORY) * seconds

        return self._place(leave)

    def enter_texts(self, texts: int) -> Place:
        """Let a request in that asks for the vectors of so many texts, at most `MAX_TEXTS`. It takes no place of an answer.

        Raises:
            ApiError: 429: there are too many already; 503: the server is shutting down.
        """
        if self.draining:
            raise shutting_down()
        if self._text_requests >= self._capacity or self._texts + texts > MAX_TEXTS:
            raise ApiError(
                429,
                f"{self._texts} texts of {self._text_requests} requests are on their way and no more may wait: try again later",
                code="queue_full",
                retry_after=RETRY_TEXTS,
            )
        self._texts += texts
        self._text_requests += 1

        def leave(_: float) -> None:
            self._texts -= texts
            self._text_requests -= 1

        return self._place(leave)

    def _place(self, leave: Callable[[float], None]) -> Place:
        self._idle.clear()

        def left(seconds: float) -> None:
            leave(seconds)
            if self.active == 0:
                self._idle.set()

        return Place(left)

    async def idle(self) -> None:
        """Wait until nothing is on its way."""
        await self._idle.wait()


class Place:
    """What a request was given; to be given back once."""

    def __init__(self, left: Callable[[float], None]) -> None:
        """
        Args:
            left: called once, with the seconds since the place was given.
        """
        self._left: Callable[[float], None] | None = left
        self._began = time.monotonic()

    def leave(self) -> None:
        """Give it back; a second time does nothing."""
        left, self._left = self._left, None
        if left is not None:
            left(time.monotonic() - self._began)
