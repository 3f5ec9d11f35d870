"""An engine on a thread of its own, for servers: requests come from any thread or event loop, text goes back to them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.engine.answer import Answer, Generation
from arriero.engine.engine import Engine
from arriero.engine.sampling import SamplingParams
from arriero.errors import GenerationError


@dataclass(frozen=True)
class Piece:
    """What a step gave a request.

    Attributes:
        text: that it released, perhaps none.
        token_ids: its new tokens.
        result: the whole answer, with the last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    result: Generation | None = None


_Message = Piece | GenerationError


class Ticket:
    """A request that was handed in. Iterate over its pieces, in one thread (`for`) or one event loop (`async for`).

    Leaving the loop early does not end the request: `cancel` does.
    """

    def __init__(self, cancel: Callable[[Ticket], None]) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._messages: deque[_Message] = deque()
        self._arrived = threading.Condition(self._lock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def cancel(self) -> None:
        """End the request as soon as the running step is over; its iteration ends with what it has come to."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, the last of which has the result.

        Raises:
            GenerationError: the request was refused, or something went wrong with it.
        """
        while True:
            with self._lock:
                while not self._messages:
                    self._arrived.wait()
                message = self._messages.popleft()
            yield _piece(message)
            if _is_last(message):
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """As `for`, without blocking the event loop."""
        with self._lock:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._lock:
                message = self._messages.popleft() if self._messages else None
                if message is None:
                    self._event.clear()
            if message is None:
                await self._event.wait()
                continue
            yield _piece(message)
            if _is_last(message):
                return

    def result(self) -> Generation:
        """Wait for the whole answer.

        Raises:
            GenerationError: as iterating.
        """
        for piece in self:
            if piece.result is not None:
                return piece.result
        raise AssertionError("an iteration ends with the result")

    async def wait(self) -> Generation:
        """As `result`, without blocking the event loop."""
        async for piece in self:
            if piece.result is not None:
                return piece.result
        raise AssertionError("an iteration ends with the result")

    def _deliver(self, message: _Message) -> None:
        """Called on the engine's thread."""
        with self._lock:
            self._messages.append(message)
            self._arrived.notify_all()
            loop, event = self._loop, self._event
        if loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(event.set)


def _piece(message: _Message) -> Piece:
    if isinstance(message, GenerationError):
        raise message
    return message


def _is_last(message: _Message) -> bool:
    return isinstance(message, Piece) and message.result is not None


class BackgroundEngine:
    """Runs an engine's steps on one thread while there is work, and waits without cost while there is none."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[Answer, Ticket] = {}
        self._answers: dict[Ticket, Answer] = {}
        self._sent: dict[Answer, int] = {}
        self._waiting_for_idle: list[threading.Event] = []
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Ticket:
        """Hand in a request, from any thread; returns at once. A refusal comes when the ticket is iterated.

        Args:
            options: of `Engine.submit`.

        Raises:
            GenerationError: the engine is closed.
        """
        ticket = Ticket(lambda given: self._commands.put(lambda: self._cancel(given)))
        with self._lock:  # so that nothing follows the command that ends the thread
            if self._closed:
                raise GenerationError("the engine is shutting down and takes no more requests")
            self._commands.put(lambda: self._submit(ticket, list(prompt), params, options))
        return ticket

    def close(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """Stop; requests that are not finished end as cancelled.

        Args:
            drain: finish what was handed in first.
            timeout: seconds to wait for that at most; then the rest is cancelled.

        Returns:
            Whether all requests were finished.
        """
        with self._lock:
            self._closed = True
        done = True
        if drain:
            idle = threading.Event()
            self._commands.put(lambda: self._when_idle(idle))
            done = idle.wait(timeout)
        self._commands.put(None)
        self._thread.join()
        return done

    # On the engine's thread

    def _work(self) -> None:
        while True:
            if not self._tickets:
                for event in self._waiting_for_idle:
                    event.set()
                self._waiting_for_idle = []
            if not self._obey(block=not self._tickets):
                break
            if self._tickets:
                self._step()
        for ticket in list(self._answers):
            self._cancel(ticket)

    def _obey(self, *, block: bool) -> bool:
        """Carry out what was asked for meanwhile; False at the end."""
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _when_idle(self, event: threading.Event) -> None:
        self._waiting_for_idle.append(event)

    def _submit(self, ticket: Ticket, prompt: list[int], params: SamplingParams, options: dict[str, Any]) -> None:
        try:
            answer = self.engine.submit(prompt, params, streaming=True, **options)
        except GenerationError as error:
            ticket._deliver(error)
            return
        self._tickets[answer], self._answers[ticket], self._sent[answer] = ticket, answer, 0

    def _cancel(self, ticket: Ticket) -> None:
        answer = self._answers.get(ticket)
        if answer is not None:
            self.engine.cancel(answer)
            self._send(answer)

    def _step(self) -> None:
        try:
            answers = self.engine.step()
        except Exception as error:  # whatever a device can raise: these requests fail, the engine goes on
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.engine.fail_running(f"the step could not be computed ({reason})")
            answers = [answer for answer in self._tickets if answer.finish_reason is not None]
        for answer in answers:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        ticket, sent = self._tickets[answer], self._sent[answer]
        new = tuple(answer.token_ids[sent:])
        self._sent[answer] = len(answer.token_ids)
        if answer.finish_reason is None:
            if new or answer.new_text:
                ticket._deliver(Piece(answer.new_text, new))
            return
        del self._tickets[answer], self._answers[ticket], self._sent[answer]
        try:
            ticket._deliver(Piece(answer.new_text, new, answer.result(self.engine.tokenizer)))
        except GenerationError as error:
            ticket._deliver(error)
