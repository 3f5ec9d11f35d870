"""Gradient-norm spikes: told when they come, and a stop if the user wants one."""

from __future__ import annotations

from collections import deque
from statistics import median

from arriero.errors import TrainingError
from arriero.training.callbacks.records import LOG, read_log
from arriero.training.trainer import Callback, StepRecord, Trainer

WINDOW = 100  # norms that the median is taken of
LEAST = 20  # so many must be known before one is called a spike: the first steps of a run are steep


class Anomalies(Callback):
    """Compares each step's gradient norm, before clipping, with the median of those before it.

    The median is not moved by the spikes themselves. A run whose norms settle at another level is warned of until half of the
    window is of the new level. A resumed run begins with the norms that its log holds.

    Args:
        factor: a norm above so many medians is a spike; 0 looks for none.
        stop: raise at a spike. It belongs before `Checkpointing`, so that the step is not saved.

    Raises:
        TrainingError: at a spike if `stop`.
    """

    def __init__(self, factor: float, *, stop: bool = False) -> None:
        self.factor, self.stop = factor, stop
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def on_train_begin(self, trainer: Trainer) -> None:
        records = [r for r in read_log(trainer.run_folder / LOG) if r["step"] <= trainer.state.step]
        self.norms.extend(r["grad_norm"] for r in records if r.get("grad_norm") is not None)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.skipped or record.label_tokens == 0 or not self.factor:
            return
        known = len(self.norms)
        usual = median(self.norms) if known >= LEAST else 0.0
        self.norms.append(record.grad_norm)
        if usual > 0.0 and record.grad_norm > self.factor * usual:
            told = (
                f"step {record.step}: gradient norm {record.grad_norm:.4g} is {record.grad_norm / usual:.1f} times the median "
                f"of the last {known} ({usual:.4g}), loss {record.loss:.4f}; "
                f"{trainer.data.describe(record.step - 1)}"
            )
            if self.stop:
                raise TrainingError(
                    f"{told}: stopped by --stop_on_spike; resume from the last checkpoint with a lower --learning_rate, "
                    "or leave this data out"
                )
            print(f"warning: {told}", flush=True)
