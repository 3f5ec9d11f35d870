"""Signals that end a run in order: clusters send them before they take a machine away."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from arriero.training.trainer import Callback, StepRecord, Trainer

# Exit code of a run that the signal ended. SLURM: `#SBATCH --signal=USR1@120`; Kubernetes and systemd send TERM.
SIGNALS = {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGINT: 130}


AGAIN_SECONDS = 1.0  # the same signal within them is one: the kernel tells a launcher's death more than once


class StopSignals(Callback):
    """After SIGTERM, SIGUSR1 or Ctrl-C the step in progress is finished, a checkpoint is written, and the run ends.

    It belongs before `Checkpointing`. A second signal of the same kind, `AGAIN_SECONDS` later or more, ends the process at
    once. As a context, it listens from the first step until the context ends, so that what is saved after the last step is
    saved too.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.noted: dict[int, float] = {}  # when each kind came first

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    @property
    def exit_code(self) -> int:
        return SIGNALS[self.received] if self.received is not None else 0

    def on_train_begin(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if time.monotonic() - self.noted.setdefault(number, time.monotonic()) >= AGAIN_SECONDS:
            signal.signal(number, self.before[self.received])
            signal.raise_signal(number)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.state.step == trainer.total_steps:
            return
        number = round(trainer.processes.max([float(self.received or 0)])[0])  # it may not have reached all of them yet
        if number:
            self.received = signal.Signals(number)
            trainer.should_stop = trainer.save_now = True
