"""Signals that end a run in order: clusters send them before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from arriero.training.trainer import Callback, StepRecord, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM: `#SBATCH --signal=USR1@120`; Kubernetes and systemd send TERM


class StopSignals(Callback):
    """After SIGTERM or SIGUSR1 the step in progress is finished, a checkpoint is written, and the run ends.

    It belongs before `Checkpointing`. A second signal of the same kind ends the process at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if self.received is not None and trainer.stopped_by is None:
            trainer.stopped_by = self.received
            trainer.should_stop = trainer.save_now = True

    def on_train_end(self, trainer: Trainer) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
