"""The end of a run whose evaluations no longer improve."""

from __future__ import annotations

import math

from arriero.errors import TrainingError
from arriero.training.callbacks.progress import counted
from arriero.training.trainer import Callback, StepRecord, Trainer


class EarlyStopping(Callback):
    """Stops the run after `patience` evaluations in a row without a gain, as transformers' `EarlyStoppingCallback` does.

    An evaluation is a gain if it beats the best one so far by more than `threshold`; it becomes the best one if it beats it at
    all. Both are part of the checkpoints, so that a resumed run stops where the whole run would have. It belongs after
    `Evaluation` and before `Checkpointing`.

    Args:
        metric: name of the evaluation metric, with or without "eval_".
        greater_is_better: the metric's direction.
        save: whether a checkpoint is written when the run stops.
    """

    def __init__(
        self, patience: int, metric: str, *, threshold: float = 0.0, greater_is_better: bool = False, save: bool = True
    ) -> None:
        self.patience, self.threshold, self.save = patience, threshold, save
        self.metric = "eval_" + metric.removeprefix("eval_")
        self.sign = 1.0 if greater_is_better else -1.0

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.state.evaluations_without_gain >= self.patience:  # the checkpoint of a run that had stopped
            self._stop(trainer)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.metrics_step != trainer.state.step:
            return
        if self.metric not in trainer.metrics:
            known = ", ".join(name.removeprefix("eval_") for name in trainer.metrics)
            raise TrainingError(f"metric_for_best_model '{self.metric[5:]}' is not computed here: one of {known}")
        state, value = trainer.state, trainer.metrics[self.metric]
        best = state.best_watched
        better = not math.isnan(value) and (best is None or self.sign * value > self.sign * best)
        gain = better and (best is None or abs(value - best) > self.threshold)
        state.evaluations_without_gain = 0 if gain else state.evaluations_without_gain + 1
        if better:
            state.best_watched = value
        enough = state.evaluations_without_gain >= self.patience
        if trainer.processes.max([float(enough)])[0] and state.step < trainer.total_steps:
            self._stop(trainer)
            trainer.save_now = trainer.save_now or self.save

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = trainer.stopped_early = True
        if trainer.processes.first:
            best = trainer.state.best_watched
            told = "none was a number" if best is None else f"best {best:.4f}"
            if self.threshold > 0:
                told += f"; better: by more than {self.threshold:g}"
            evaluations = counted(trainer.state.evaluations_without_gain, "evaluation")
            print(
                f"early stopping after step {trainer.state.step}: {evaluations} without a better {self.metric[5:]} ({told})",
                flush=True,
            )
