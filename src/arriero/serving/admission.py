"""How many answers may be on their way: what is more is refused at once, so that nobody waits in vain."""

from __future__ import annotations

import asyncio
import math
import time

from arriero.serving.api_errors import ApiError, shutting_down

_MEMORY = 0.9  # of the mean time of an answer: how much of it an answer leaves
LONGEST_RETRY = 60  # seconds


class Admission:
    """Counts answers from request to end. For one event loop.

    Attributes:
        active: answers on their way.
        draining: no more are let in.
    """

    def __init__(self, running: int, waiting: int) -> None:
        """
        Args:
            running: answers that are computed at once.
            waiting: those that may wait besides.
        """
        self._running, self._capacity = running, running + waiting
        self.active, self.draining = 0, False
        self._mean_seconds = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

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
        if self.active + answers > self._capacity:
            seconds = self._mean_seconds * (self.active + answers - self._capacity) / self._running
            raise ApiError(
                429,
                f"{self.active} answers are on their way and no more may wait: try again later",
                code="queue_full",
                retry_after=min(LONGEST_RETRY, max(1, math.ceil(seconds))),
            )
        self.active += answers
        self._idle.clear()
        return Place(self, answers)

    def leave(self, answers: int, seconds: float) -> None:
        """A request has ended."""
        self.active -= answers
        self._mean_seconds = _MEMORY * self._mean_seconds + (1 - _MEMORY) * seconds
        if self.active == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is on its way."""
        await self._idle.wait()


class Place:
    """What a request was given; to be given back once."""

    def __init__(self, admission: Admission, answers: int) -> None:
        self._admission, self._answers, self._began = admission, answers, time.monotonic()

    def leave(self) -> None:
        """Give it back; a second time does nothing."""
        answers, self._answers = self._answers, 0
        if answers:
            self._admission.leave(answers, time.monotonic() - self._began)
