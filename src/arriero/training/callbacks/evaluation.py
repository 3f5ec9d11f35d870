"""Evaluation while training."""

from __future__ import annotations

from collections.abc import Callable

from arriero.training.trainer import Callback, StepRecord, Trainer


def is_due(trainer: Trainer, strategy: str, every: int) -> bool:
    """Whether a "no" | "steps" | "epoch" event falls on the step just done; the last step always counts unless "no"."""
    step = trainer.state.step
    if strategy == "no":
        return False
    period = every if strategy == "steps" else trainer.data.steps_per_epoch
    return step % max(1, period) == 0 or step == trainer.total_steps


class Evaluation(Callback):
    """Computes the metrics when they are due and leaves them in `trainer.metrics`."""

    def __init__(self, evaluate: Callable[[], dict[str, float]], strategy: str, every: int) -> None:
        self.evaluate, self.strategy, self.every = evaluate, strategy, every

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if is_due(trainer, self.strategy, self.every):
            trainer.model.eval()
            trainer.metrics = {f"eval_{key}": value for key, value in self.evaluate().items()}
            trainer.metrics_step = trainer.state.step
            trainer.model.train()
            trainer.log({"step": trainer.state.step, "epoch": round(trainer.epoch, 4), **trainer.metrics})
