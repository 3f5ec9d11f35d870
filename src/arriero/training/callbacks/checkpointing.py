"""Checkpoints while training: when they are due, and which one was best."""

from __future__ import annotations

import math

from arriero.errors import FormatError, PeerError, TrainingError
from arriero.training.callbacks.evaluation import is_due
from arriero.training.checkpoint import TrainState, load_checkpoint, prune
from arriero.training.checkpoint_writer import CheckpointWriter
from arriero.training.trainer import Callback, StepRecord, Trainer


class Checkpointing(Callback):
    """Saves when due, keeps the best and the newest, and puts the best back at the end if asked.

    What could not be written in the background is told as soon as it is known, and the run as it stands then is saved in its
    place; if that fails too the run ends.

    Args:
        metric: name of the evaluation metric that decides, with or without "eval_"; None keeps no best.
        greater_is_better: the metric's direction.
        keep: how many checkpoints stay; None keeps all.
        load_best: whether the best weights are loaded after the last step.
        asynchronous: see `CheckpointWriter`.
    """

    def __init__(
        self,
        strategy: str,
        every: int,
        *,
        keep: int | None = None,
        metric: str | None = None,
        greater_is_better: bool = False,
        load_best: bool = False,
        asynchronous: bool = False,
    ) -> None:
        self.asynchronous = asynchronous
        self.writer = CheckpointWriter()
        self.strategy, self.every, self.keep, self.load_best = strategy, every, keep, load_best
        self.metric = None if metric is None else "eval_" + metric.removeprefix("eval_")
        self.sign = 1.0 if greater_is_better else -1.0
        self.unwritten = False  # the last checkpoint that was due is not on disk
        self.best_before: tuple[float | None, str | None] | None = None  # what was the best before it

    def on_train_begin(self, trainer: Trainer) -> None:
        self.writer = CheckpointWriter(trainer.processes, asynchronous=self.asynchronous)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if is_due(trainer, self.strategy, self.every) or trainer.save_now or self.writer.has_failed():
            self.save(trainer)

    def save(self, trainer: Trainer, *, at_once: bool = False) -> None:
        """Write a checkpoint and delete what is no longer kept.

        Args:
            at_once: not in the background; so it is too where the one before could not be written there.
        """
        at_once = self._lost(trainer) or at_once
        state = trainer.state
        self._note_best(trainer)
        state.scaler = trainer.precision.state()

        def clean_up(written: TrainState) -> None:
            self.unwritten = False
            if trainer.processes.first:
                prune(trainer.run_folder, self.keep, written.best_checkpoint, written.step)

        self.unwritten = True
        parts = trainer.optimizer.parts()
        self.writer.save(trainer.run_folder, trainer.weights, parts, state, clean_up, at_once=at_once)

    def _lost(self, trainer: Trainer) -> bool:
        """Wait for the last checkpoint. If it could not be written, tell it, and forget it as the best."""
        failure = self.writer.settle()
        if failure is None:
            return False
        if trainer.processes.first:
            print(f"warning: {failure}; step {trainer.state.step} is saved now", flush=True)
        if self.best_before is not None:
            trainer.state.best_metric, trainer.state.best_checkpoint = self.best_before
        return True

    def _note_best(self, trainer: Trainer) -> None:
        self.best_before = trainer.state.best_metric, trainer.state.best_checkpoint
        if self.metric is None or trainer.metrics_step != trainer.state.step:
            return  # weights that were not scored (a signal came between two evaluations) cannot be the best
        if self.metric not in trainer.metrics:
            known = ", ".join(name.removeprefix("eval_") for name in trainer.metrics)
            raise TrainingError(f"metric_for_best_model '{self.metric[5:]}' is not computed here: one of {known}")
        value, best = trainer.metrics[self.metric], trainer.state.best_metric
        if math.isnan(value):
            return
        if best is None or math.isnan(best) or self.sign * value > self.sign * best:
            trainer.state.best_metric = value
            trainer.state.best_checkpoint = f"checkpoint-{trainer.state.step}"

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.failed:  # other processes may not answer any more
            self.writer.wait()
            return
        if self._lost(trainer):
            self.save(trainer, at_once=True)
        best = trainer.state.best_checkpoint
        if (
            self.load_best
            and best
            and (trainer.state.step == trainer.total_steps or trainer.stopped_early)
            and not self.unwritten
        ):
            try:
                load_checkpoint(trainer.run_folder / best, trainer.weights, processes=trainer.processes)
                found = f"best checkpoint: {best} ({(self.metric or '')[5:]} {trainer.state.best_metric:.4f}), loaded"
            except (FormatError, PeerError) as error:
                found = f"warning: the best checkpoint is lost, the last weights are kept: {error}"
            if trainer.processes.first:
                print(found, flush=True)
