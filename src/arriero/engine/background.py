"""An engine on a thread of its own, for servers: requests come from any thread or event loop, text goes back to them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arriero.engine.answer import Answer
from arriero.engine.answer_group import AnswerGroup
from arriero.engine.engine import Engine
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.ticket import EngineClosedError, Piece, RefusedError, Ticket
from arriero.errors import GenerationError, PeerError
from arriero.process_threads import release_workers

if TYPE_CHECKING:
    from arriero.engine.request_adapters import AdapterPool


Result = TypeVar("Result")


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
        self._turns: deque[Callable[[Exception | None], bool]] = deque()
        self._waiting_for_idle: list[threading.Event] = []
        self._lock, self._closed = threading.Lock(), False
        self._ended = self._cut_short = False  # the thread; and requests with it
        self.failure: PeerError | GenerationError | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        release_workers()  # of the thread that has loaded the model
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
                ticket.deliver(_refusal(error))
                return ticket
        with self._lock:  # so that nothing follows the command that ends the thread
            if self._closed:
                reason = "the engine is shutting down and takes no more requests"
                raise EngineClosedError(reason if self.failure is None else str(self.failure))
            self._commands.put(lambda: self._submit(ticket, list(prompt), params, options))
        return ticket

    def call(self, function: Callable[[Engine], Result]) -> Result:
        """Run something short on the engine's thread, between two steps, and wait for what it returns.

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

    def take_turn(self, function: Callable[[Engine], Result]) -> Future[Result]:
        """Run something that takes as long as a step on the engine's thread. Turns come in their order, and while there are
        steps to compute, one of them between two turns.

        Returns:
            At once. Cancelling the future before its turn takes the turn back. It fails with an EngineClosedError where the
            engine is closed first.

        Raises:
            EngineClosedError: the engine is closed.
        """
        future: Future[Result] = Future()

        def run(refused: Exception | None) -> bool:
            """Whether the engine's time was taken."""
            if not future.set_running_or_notify_cancel():
                return False
            if refused is not None:
                future.set_exception(refused)
                return False
            try:
                future.set_result(function(self.engine))
            except BaseException as error:  # it is the caller's, and the engine goes on
                future.set_exception(error)
            return True

        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is shutting down" if self.failure is None else str(self.failure))
            self._commands.put(lambda: self._turns.append(run))
        return future

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
            Whether all requests were finished; without `drain`, that it has stopped.
        """
        idle = threading.Event()
        with self._lock:  # so that the thread sees what it is asked, or has ended
            self._closed = True
            if drain and not self._ended:
                self._commands.put(lambda: self._waiting_for_idle.append(idle))
            else:
                idle.set()
        done = idle.wait(timeout)
        self._commands.put(None)
        self._thread.join()
        return done and not (drain and self._cut_short)

    # On the engine's thread

    def _work(self) -> None:
        while True:
            if not self._tickets and not self._turns:
                self._tell_idle()
            try:
                if not self._obey(block=not self._tickets and not self._turns):
                    break
                self._give_turn()
                if self._tickets:
                    self._step()
            except Exception as error:  # a defect: those who wait must hear of it, and the server can end in order
                self._fail(GenerationError(f"the engine has failed ({_reason(error)}): start it again"))
        self._cut_short = bool(self._answers)
        for ticket in list(self._answers):
            self._cancel(ticket)
        self._refuse_turns(EngineClosedError("the engine is shutting down"))
        with self._lock:
            self._ended = True
        while not self._commands.empty():  # of whoever closes it once more
            command = self._commands.get()
            if command is not None:
                command()
        self._tell_idle()

    def _tell_idle(self) -> None:
        for event in self._waiting_for_idle:
            event.set()
        self._waiting_for_idle = []

    def _give_turn(self) -> None:
        """To the first who still wants it."""
        refused = None if self.failure is None else EngineClosedError(str(self.failure))
        while self._turns and not self._turns.popleft()(refused):
            pass

    def _refuse_turns(self, error: Exception) -> None:
        while self._turns:
            self._turns.popleft()(error)

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

    def _submit(self, ticket: Ticket, prompt: list[int], params: SamplingParams, options: dict[str, Any]) -> None:
        try:
            if self.failure is not None:
                raise EngineClosedError(str(self.failure))
            group = self.engine.submit_group(prompt, params, streaming=True, **options)
        except Exception as error:  # whatever a request can be: the engine goes on
            ticket.deliver(_refusal(error))
            return
        self._answers[ticket] = group
        self._tickets |= dict.fromkeys(group.answers, ticket)
        self._sent |= dict.fromkeys(group.answers, 0)
        ticket.take()

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
            ticket.deliver(GenerationError(str(error)))
            with contextlib.suppress(Exception):
                self.engine.cancel(group)
        self._refuse_turns(GenerationError(str(error)))

    def _send(self, answer: Answer) -> None:
        """Deliver what is new of an answer."""
        ticket = self._tickets.get(answer)
        if ticket is None:
            return  # the request has failed with another of its answers
        group, tokenizer = self._answers[ticket], self.engine.tokenizer
        if group.error:
            self.engine.cancel(group)
            self._forget(ticket)
            rows = [one.sampling for one in group.answers if one.error]
            own_fault = any(row.dead_end or (row.grammar is not None and row.grammar.error) for row in rows)
            ticket.deliver((RefusedError if own_fault else GenerationError)(group.error))
        elif group.params.selects:
            if group.over:
                self._forget(ticket)
                for index, result in enumerate(group.results(tokenizer)):
                    ids, logprobs, of_prompt = tuple(result.token_ids), result.logprobs, result.prompt_logprobs
                    ticket.deliver(Piece(result.text, ids, result, index, logprobs, of_prompt))
        else:
            sent, index = self._sent[answer], group.answers.index(answer)
            new, logprobs = tuple(answer.token_ids[sent:]), tuple(answer.logprobs[sent:])
            of_prompt = () if sent else tuple(answer.prompt_logprobs)
            self._sent[answer] = len(answer.token_ids)
            if answer.finish_reason is not None:
                del self._tickets[answer], self._sent[answer]
                if not any(other in self._tickets for other in group.answers):  # several may end in one step
                    self._forget(ticket)
                ticket.deliver(Piece(answer.new_text, new, answer.result(tokenizer), index, logprobs, of_prompt))
            elif new or answer.new_text:
                ticket.deliver(Piece(answer.new_text, new, None, index, logprobs, of_prompt))

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
