"""An engine on a thread of its own, for servers: requests come from any thread or event loop, text goes back to them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arriero.engine.answer import Answer, Generation
from arriero.engine.answer_group import AnswerGroup
from arriero.engine.engine import Engine
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError, PeerError

if TYPE_CHECKING:
    from arriero.engine.request_adapters import AdapterPool


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


Result = TypeVar("Result")
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

    def _deliver(self, message: _Message) -> None:
        """Called on the engine's thread."""
        with self._lock:
            self._messages.append(message)
            self._arrived.notify_all()
        self._wake()

    def _take(self) -> None:
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


class BackgroundEngine:
    """Runs an engine's steps on one thread while there is work, and waits without cost while there is none.

    Attributes:
        failure: why nothing can be computed any more: another process that holds a part of the model is gone, or a defect.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[Answer, Ticket] = {}
        self._answers: dict[Ticket, AnswerGroup] = {}
        self._sent: dict[Answer, int] = {}
        self._waiting_for_idle: list[threading.Event] = []
        self._lock, self._closed = threading.Lock(), False
        self.failure: PeerError | GenerationError | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Ticket:
        """Hand in a request, from any thread. A refusal comes when the ticket is iterated.

        Returns at once, but for a structure that is new, which is compiled first: the caller waits, and the engine does not.

        Args:
            options: of `Engine.submit`.

        Raises:
            EngineClosedError: the engine is closed.
        """
        ticket = Ticket(lambda given: self._commands.put(lambda: self._cancel(given)), params.n)
        if params.structure is not None:
            try:
                self.engine.grammars.compile(params.structure)
            except Exception as error:
                ticket._deliver(_refusal(error))
                return ticket
        with self._lock:  # so that nothing follows the command that ends the thread
            if self._closed:
                reason = "the engine is shutting down and takes no more requests"
                raise EngineClosedError(reason if self.failure is None else str(self.failure))
            self._commands.put(lambda: self._submit(ticket, list(prompt), params, options))
        return ticket

    def call(self, function: Callable[[Engine], Result]) -> Result:
        """Run something on the engine's thread, between two steps, and wait for what it returns.

        Raises:
            EngineClosedError: the engine is closed.
            Exception: what `function` raises.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.engine))
            except BaseException as error:  # it is the caller's, and the engine goes on
                future.set_exception(error)

        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is shutting down")
            self._commands.put(run)
        return future.result()

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Let requests use an adapter under a name. It is read on the caller's thread, and holds up no request meanwhile.

        Raises:
            ArrieroError: as `AdapterPool.read`; the engine's runner has no pool of adapters.
        """
        pool = self._adapters()
        adapter = pool.read(name, folder)
        self.call(lambda engine: pool.add(adapter))

    def unload_adapter(self, name: str) -> None:
        """Let no new request use it; those that have begun end with it.

        Raises:
            GenerationError: there is none of this name, or no pool of adapters.
        """
        pool = self._adapters()
        self.call(lambda _: pool.unload(name))

    def _adapters(self) -> AdapterPool:
        pool = self.engine.runner.adapters
        if pool is None:
            raise GenerationError("this engine has no adapters that requests could name")
        return pool

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
            try:
                if not self._obey(block=not self._tickets):
                    break
                if self._tickets:
                    self._step()
            except Exception as error:  # a defect: those who wait must hear of it, and the server can end in order
                self._fail(GenerationError(f"the engine has failed ({_reason(error)}): start it again"))
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
            if self.failure is not None:
                raise EngineClosedError(str(self.failure))
            group = self.engine.submit_group(prompt, params, streaming=True, **options)
        except Exception as error:  # whatever a request can be: the engine goes on
            ticket._deliver(_refusal(error))
            return
        self._answers[ticket] = group
        self._tickets |= dict.fromkeys(group.answers, ticket)
        self._sent |= dict.fromkeys(group.answers, 0)
        ticket._take()

    def _cancel(self, ticket: Ticket) -> None:
        group = self._answers.get(ticket)
        if group is not None:
            self.engine.cancel(group)
            for answer in group.answers:
                self._send(answer)

    def _step(self) -> None:
        try:
            answers = self.engine.step()
        except PeerError as error:
            self._fail(error)
            return
        except Exception as error:  # whatever a device can raise: these requests fail, the engine goes on
            self.engine.fail_running(f"the step could not be computed ({_reason(error)})")
            answers = [answer for answer in self._tickets if answer.finish_reason is not None]
        for answer in answers:
            self._send(answer)

    def _fail(self, error: PeerError | GenerationError) -> None:
        """End everything: another process of this run is gone, or nothing can be relied on."""
        with self._lock:
            self._closed, self.failure = True, error
        answers, self._tickets, self._answers, self._sent = self._answers, {}, {}, {}
        for ticket, group in answers.items():
            ticket._deliver(GenerationError(str(error)))
            with contextlib.suppress(Exception):
                self.engine.cancel(group)

    def _send(self, answer: Answer) -> None:
        """Deliver what is new of an answer."""
        ticket = self._tickets.get(answer)
        if ticket is None:
            return  # the request has failed with another of its answers
        group, tokenizer = self._answers[ticket], self.engine.tokenizer
        if group.error:
            self.engine.cancel(group)
            self._forget(ticket)
            grammars = [one.sampling.grammar for one in group.answers]
            own_fault = any(grammar is not None and grammar.error for grammar in grammars)
            ticket._deliver((RefusedError if own_fault else GenerationError)(group.error))
        elif group.params.selects:
            if group.over:
                self._forget(ticket)
                for index, result in enumerate(group.results(tokenizer)):
                    ids, logprobs, of_prompt = tuple(result.token_ids), result.logprobs, result.prompt_logprobs
                    ticket._deliver(Piece(result.text, ids, result, index, logprobs, of_prompt))
        else:
            sent, index = self._sent[answer], group.answers.index(answer)
            new, logprobs = tuple(answer.token_ids[sent:]), tuple(answer.logprobs[sent:])
            of_prompt = () if sent else tuple(answer.prompt_logprobs)
            self._sent[answer] = len(answer.token_ids)
            if answer.finish_reason is not None:
                del self._tickets[answer], self._sent[answer]
                if not any(other in self._tickets for other in group.answers):  # several may end in one step
                    self._forget(ticket)
                ticket._deliver(Piece(answer.new_text, new, answer.result(tokenizer), index, logprobs, of_prompt))
            elif new or answer.new_text:
                ticket._deliver(Piece(answer.new_text, new, None, index, logprobs, of_prompt))

    def _forget(self, ticket: Ticket) -> None:
        for answer in self._answers.pop(ticket).answers:
            self._tickets.pop(answer, None)
            self._sent.pop(answer, None)


def _refusal(error: Exception) -> GenerationError:
    """What a request is told that is not taken."""
    if isinstance(error, EngineClosedError):
        return error
    if isinstance(error, GenerationError):
        return RefusedError(str(error))
    return GenerationError(f"the request cannot be taken ({_reason(error)})")


def _reason(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
