"""Evaluation while training."""

from __future__ import annotations

from collections.abc import Callable

from arriero.training.callbacks.stop_signals import asked_to_stop
from arriero.training.evaluation import EvaluationStopped
from arriero.training.trainer import Callback, StepRecord, Trainer


def is_due(trainer: Trainer, strategy: str, every: int) -> bool:
    """Whether a "no" | "steps" | "epoch" event falls on the step just done; the last step always counts unless "no"."""
    step = trainer.state.step
    if strategy == "no":
        return False
    period = every if strategy == "steps" else trainer.data.steps_per_epoch
    return step % max(1, period) == 0 or step == trainer.total_steps


class Evaluation(Callback):
    """Computes the metrics when they are due and leaves them in `trainer.metrics`.

    Where a signal ends the run meanwhile there are none: it belongs before `StopSignals`, which saves then.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], strategy: str, every: int) -> None:
        self.evaluate, self.strategy, self.every = evaluate, strategy, every

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if is_due(trainer, self.strategy, self.every) and not asked_to_stop(trainer.processes):
            trainer.model.eval()
            try:
                found = self.evaluate()
            except EvaluationStopped:
                return
            finally:
                trainer.model.train()
            trainer.metrics = {f"eval_{key}": value for key, value in found.items()}
            trainer.metrics_step = trainer.state.step
            trainer.log({"step": trainer.state.step, "epoch": round(trainer.epoch, 4), **trainer.metrics})
