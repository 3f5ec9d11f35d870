"""Signals to a run that has not made a step yet: there is nothing to save, so it ends at once. Imports no torch."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from arriero.errors import RunStopped

# They end a run in order; before the first step Ctrl-C is Python's own.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 1.0  # the same signal within them is one: the kernel tells a launcher's death more than once


class StoppedEarly(BaseException):
    """A signal came before the first step. No part of a run may take it for an error of its own, nor tell other processes:
    they got the signal too, or notice that this one is gone."""

    peers_know = True

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def stopped_early(number: int) -> RunStopped:
    """What a run ends with then."""
    name, exit_code = signal.Signals(number).name, 130 if number == signal.SIGINT else 0
    return RunStopped(f"{name}: ended before the first step: nothing to save", exit_code)


class EarlySignals:
    """A block whose `SIGNALS` end it at once, with `RunStopped`; a second one, `AGAIN_SECONDS` later or more, ends the process.

    Blocks may lie inside each other. When the first step is about to be made, `StopSignals` takes the signals over for good.

    Args:
        last: nothing comes after the block in this process: a signal that comes while it ends is ignored.
    """

    def __init__(self, *, last: bool = False) -> None:
        self.last = last
        self.before: dict[int, Any] = {}
        self.noted: float | None = None

    def __enter__(self) -> EarlySignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                # not one that is ignored, nor one that the caller of a function has an answer to
                if signal.getsignal(number) is signal.SIG_DFL or _of_block(signal.getsignal(number)):
                    self.before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        early = isinstance(error, StoppedEarly) or self.noted is not None
        for number, handler in self.before.items():
            if _of_block(signal.getsignal(number)) is self:
                signal.signal(number, signal.SIG_IGN if early and self.last else handler)
            if (outside := _of_block(handler)) is not None:
                outside.noted = outside.noted or self.noted
        if isinstance(error, StoppedEarly):
            raise stopped_early(error.number) from None

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.noted is None:
            self.noted = time.monotonic()
            raise StoppedEarly(number)
        if time.monotonic() - self.noted >= AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _of_block(handler: Any) -> EarlySignals | None:
    """The block whose handler this is."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, EarlySignals) else None


def handler_outside(number: int, handler: Any) -> Any:
    """What handled a signal before all blocks."""
    while (block := _of_block(handler)) is not None:
        handler = block.before[number]
    return handler
