"""A request that a background engine works on: its pieces come from another thread, to a thread or an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

from arriero.engine.answer import Generation
from arriero.engine.logprobs import TokenLogprobs
from arriero.errors import GenerationError


class RefusedError(GenerationError):
    """A request that asks for what cannot be: nothing of it was computed."""


class EngineClosedError(GenerationError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """What a step gave a request.

    Attributes:
        text: that it released, perhaps none.
        token_ids: its new tokens.
        result: the whole answer, with its last piece.
        index: of the answer, where the request asks for several. Where the best are selected (`best_of`) each is one piece,
            the best first.
        logprobs: of the new tokens, where they are asked for.
        prompt_logprobs: see `Generation`; with the first piece.
    """

    text: str
    token_ids: tuple[int, ...]
    result: Generation | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


_Message = Piece | GenerationError


class Ticket:
    """A request that was handed in. Iterate over its answers' pieces, in one thread (`for`) or one event loop (`async for`).

    Leaving the loop early does not end the request: `cancel` does.
    """

    def __init__(self, cancel: Callable[[Ticket], None], answers: int = 1) -> None:
        self._cancel = cancel
        self._left = answers  # whose last pieces have not been read
        self._lock = threading.Lock()
        self._messages: deque[_Message] = deque()
        self._arrived = threading.Condition(self._lock)
        self._taken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def cancel(self) -> None:
        """End the request as soon as the running step is over; its iteration ends with what it has come to."""
        self._cancel(self)

    async def taken(self) -> None:
        """Wait until the engine has taken the request in, so that its answer will come.

        Raises:
            RefusedError: it has not, and says why.
            GenerationError: something went wrong already.
        """
        with self._lock:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._lock:
                message = self._messages[0] if self._messages else None
                if message is None and not self._taken:
                    self._event.clear()
                else:
                    break
            await self._event.wait()
        if isinstance(message, GenerationError):
            self._left = 0
            raise message

    def __iter__(self) -> Iterator[Piece]:
        """The pieces; an answer's last one has the result.

        Raises:
            RefusedError: the request asks for what cannot be.
            GenerationError: something went wrong with it.
        """
        while self._left:
            with self._lock:
                while not self._messages:
                    self._arrived.wait()
                message = self._messages.popleft()
            yield self._piece(message)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """As `for`, without blocking the event loop."""
        with self._lock:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        while self._left:
            with self._lock:
                message = self._messages.popleft() if self._messages else None
                if message is None:
                    self._event.clear()
            if message is None:
                await self._event.wait()
                continue
            yield self._piece(message)

    def result(self) -> Generation:
        """Wait for the whole answer; others are its `alternatives`.

        Raises:
            GenerationError: as iterating.
        """
        return _first([piece for piece in self if piece.result is not None])

    async def wait(self) -> Generation:
        """As `result`, without blocking the event loop."""
        return _first([piece async for piece in self if piece.result is not None])

    def _piece(self, message: _Message) -> Piece:
        if isinstance(message, GenerationError):
            self._left = 0
            raise message
        self._left -= message.result is not None
        return message

    def deliver(self, message: _Message) -> None:
        """Called on the engine's thread."""
        with self._lock:
            self._messages.append(message)
            self._arrived.notify_all()
        self._wake()

    def take(self) -> None:
        """Called on the engine's thread."""
        with self._lock:
            self._taken = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            loop, event = self._loop, self._event
        if loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)


def _first(last_pieces: list[Piece]) -> Generation:
    """The first of a request's answers, with the others."""
    first, *others = [piece.result for piece in sorted(last_pieces, key=lambda piece: piece.index) if piece.result]
    return replace(first, alternatives=tuple(others))
