"""Signals that end a run in order: clusters send them before they take a machine away."""

from __future__ import annotations

import signal
import threading
import time
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any

from arriero.early_signals import AGAIN_SECONDS, StoppedEarly, handler_outside, stopped_early
from arriero.parallel.processes import Processes
from arriero.training.trainer import Callback, StepRecord, Trainer

# Exit code of a run that the signal ended. SLURM: `#SBATCH --signal=USR1@120`; Kubernetes and systemd send TERM.
SIGNALS = {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGINT: 130}
_LISTENING: ContextVar[StopSignals | None] = ContextVar("listening", default=None)


class StopSignals(Callback):
    """After SIGTERM, SIGUSR1 or Ctrl-C the step in progress is finished, an evaluation is abandoned, a checkpoint is written,
    and the run ends.

    It belongs before `Checkpointing`. A second signal of the same kind, `AGAIN_SECONDS` later or more, ends the process at
    once. As a context, it listens from the first step until the context ends, so that what is saved after the last step is
    saved too. What comes before is the affair of `EarlySignals`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.noted: dict[int, float] = {}  # when each kind came first
        self._token: Token[StopSignals | None] | None = None

    def __enter__(self) -> StopSignals:
        self._token = _LISTENING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _LISTENING.reset(self._token)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    @property
    def exit_code(self) -> int:
        return SIGNALS[self.received] if self.received is not None else 0

    def on_train_begin(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                self.before[number] = handler_outside(number, signal.signal(number, self._note))
        try:
            self.agreed(trainer.processes)
        except RuntimeError:
            if self.received is None:
                raise
            raise StoppedEarly(
                self.received
            ) from None  # another process heard of it a moment before this one, and is gone
        if self.received is not None:
            raise stopped_early(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if time.monotonic() - self.noted.setdefault(number, time.monotonic()) >= AGAIN_SECONDS:
            signal.signal(number, self.before[self.received])
            signal.raise_signal(number)

    def agreed(self, processes: Processes) -> bool:
        """Whether a signal has reached any of the processes, which all ask at the same points; they all know it then."""
        number = round(processes.max([float(self.received or 0)])[0])
        if number:
            self.received = signal.Signals(number)
        return number > 0

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.state.step < trainer.total_steps and self.agreed(trainer.processes):
            trainer.should_stop = trainer.save_now = True


def asked_to_stop(processes: Processes) -> bool:
    """Whether a signal is to end the run that this is a part of; every process asks at the same points."""
    listening = _LISTENING.get()
    return listening is not None and listening.agreed(processes)
