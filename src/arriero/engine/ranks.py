"""One engine over a model that several processes hold: rank 0 decides, the others compute what it tells them.

Requests, sampling, grammars, guesses and clocks are rank 0's alone, so nothing has to come out alike in all processes but the
forward passes. A step is one broadcast of integers over gloo (two if it is long), then the forward pass with its collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.engine.step_messages import HEADER, Kind, Limits, Message, decode, encode, header, read_header
from arriero.engine.work import NO_ADAPTER, Runner, Work
from arriero.errors import PeerError
from arriero.parallel.launching.report import one_line, says_peer
from arriero.parallel.processes import Processes, silence_limit

if TYPE_CHECKING:
    from arriero.engine.work import Logits

T = TypeVar("T")
FRAME = 1024  # integers of the first broadcast; few steps need a second
# How long ranks wait for each other where the step failed in one of them. If it went wrong alike in all, they go on.
GRACE = 30.0


class _Channel:
    """Numbered messages from rank 0 to all others; each process has one, and makes it at the same point."""

    def __init__(self, processes: Processes) -> None:
        self._group = processes.channel
        self._number = 0

    def send(self, message: Message, limit: timedelta) -> None:
        """Tell all others; waits at most this long for one that does not listen."""
        payload = encode(message)
        numbers = header(message.kind, self._number, len(payload)) + payload
        self._number += 1
        self._broadcast(torch.tensor(numbers[:FRAME] + [0] * (FRAME - len(numbers))), limit)
        if len(numbers) > FRAME:
            self._broadcast(torch.tensor(numbers[FRAME:]), limit)

    def receive(self, limits: Limits, limit: timedelta) -> Message:
        """The next message.

        Raises:
            PeerError: one that cannot be.
        """
        frame = torch.empty(FRAME, dtype=torch.int64)
        self._broadcast(frame, limit)
        numbers = frame.tolist()
        kind, length = read_header(numbers[:HEADER], self._number)
        self._number += 1
        payload = numbers[HEADER : HEADER + length]
        if length > len(payload):
            rest = torch.empty(length - len(payload), dtype=torch.int64)
            self._broadcast(rest, limit)
            payload += rest.tolist()
        return decode(kind, payload, limits)

    def _broadcast(self, tensor: Tensor, limit: timedelta) -> None:
        work = dist.broadcast(tensor, 0, group=self._group, async_op=True)
        assert work is not None
        work.wait(limit)


class LeaderRunner:
    """The `Runner` of rank 0: what it computes, the ranks in `follow` compute with it. Close it, or they wait for ever.

    While there is nothing to compute it says so from time to time, on a thread of its own: else the others would give it up.
    """

    def __init__(self, runner: Runner, processes: Processes, *, grace: float = GRACE) -> None:
        """
        Args:
            runner: of this process's share of the model; the others make theirs at the same point.
            grace: seconds for the others to hear that a step failed here.
        """
        self._runner = runner
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.vocab_size, self.context, self.prefix_length = runner.vocab_size, runner.context, runner.prefix_length
        self.reuses, self.adapters = runner.reuses, runner.adapters
        self.library, self.device = runner.library, runner.device
        self._channel, self._limit, self._grace = _Channel(processes), silence_limit(), timedelta(seconds=grace)
        self._lock = threading.Lock()  # one message, and what it asks for, after the other
        self._lost: PeerError | None = None
        self._spoke = False
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> LeaderRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(PeerError):  # which would hide the error
                self.close()

    @property
    def recalled(self) -> Sequence[int]:
        """See `Runner`."""
        return self._runner.recalled

    def run(self, work: Sequence[Work]) -> Logits:
        """See `Runner`.

        Raises:
            PeerError: another process is gone or silent; then nothing can be computed any more.
        """
        return self._together(Message(Kind.RUN, tuple(work)), lambda: self._runner.run(work))

    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = NO_ADAPTER) -> None:
        """See `Runner`, and `run`."""
        message = Message(Kind.BEGIN, (), tuple(blocks), start, end, adapter)
        self._together(message, lambda: self._runner.begin(blocks, start, end, adapter))

    def close(self) -> None:
        """Let the others go; nothing can be computed afterwards.

        Raises:
            PeerError: one of them is gone.
        """
        if self._closed.is_set():
            return
        with self._lock:
            self._closed.set()
            if self._lost is None:
                self._tell(Message(Kind.CLOSE))
        self._heart.join()

    def _together(self, message: Message, compute: Callable[[], T]) -> T:
        with self._lock:
            self._tell(message)
            try:
                return compute()
            except Exception as error:
                if says_peer(error):
                    raise self._give_up(error) from error
                self._tell(Message(Kind.FAILED), self._grace)
                raise
            except BaseException as error:  # it was interrupted; the others are somewhere in the step
                self._give_up(error)
                raise

    def _tell(self, message: Message, limit: timedelta | None = None) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            self._channel.send(message, limit or self._limit)
        except RuntimeError as error:  # of gloo
            raise self._give_up(error) from error
        self._spoke = True

    def _give_up(self, error: BaseException) -> PeerError:
        self._lost = lost(error)
        return self._lost

    def _beat(self) -> None:
        while not self._closed.wait(self._limit.total_seconds() / 4):
            with self._lock:
                if self._lost is not None or self._closed.is_set():
                    return
                if not self._spoke:
                    with suppress(PeerError):  # the next request finds it
                        self._tell(Message(Kind.IDLE))
                self._spoke = False


def follow(runner: Runner, processes: Processes, *, grace: float = GRACE) -> None:
    """Compute with rank 0 whatever its `LeaderRunner` is asked for, until that is closed.

    Args:
        runner: of this process's share of the model.
        grace: seconds to wait for word that a step which failed here failed in rank 0 too; then they go on.

    Raises:
        PeerError: rank 0 or another process is gone or silent, or sent what cannot be.
        Exception: what a step raised here alone.
    """
    channel, limits, limit = _Channel(processes), Limits.of(runner), silence_limit()
    failure: Exception | None = None
    while True:
        try:
            message = channel.receive(limits, limit if failure is None else timedelta(seconds=grace))
        except (RuntimeError, PeerError) as error:
            raise (lost(error) if failure is None else _told(failure)) from error
        if failure is not None and message.kind is not Kind.FAILED:
            raise _told(failure)
        failure = None
        if message.kind is Kind.CLOSE:
            return
        try:
            if message.kind is Kind.RUN:
                runner.run(message.work)
            elif message.kind is Kind.BEGIN:
                runner.begin(message.blocks, message.start, message.end, message.adapter)
        except Exception as error:
            if says_peer(error):
                raise lost(error) from error
            failure = error


def lost(error: BaseException) -> PeerError:
    """What to say where the processes cannot go on together."""
    if isinstance(error, PeerError):
        return _told(error)
    text = one_line(error)
    if "closed by peer" in text or "reset by peer" in text:
        reason = "its connection is closed"
    elif "timed out" in text.lower():
        reason = "no word in time"
    else:
        reason = text[:200] or type(error).__name__
    return _told(PeerError(f"another process of this run ended or does not answer ({reason}): start all of them again"))


E_ = TypeVar("E_", bound=BaseException)


def _told(error: E_) -> E_:
    """Mark an error as one that other processes will notice by this one's end: they may not listen any more."""
    error.peers_know = True  # type: ignore[attr-defined]
    return error
