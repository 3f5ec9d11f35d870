"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from arriero.training.row_noise import RowNoise
from arriero.training.trainer import Callback, StepRecord, Trainer


class Neftune(Callback):
    """Adds the noise in the trainer's passes, and only there: what evaluates has passes of its own."""

    def __init__(self, alpha: float, seed: int) -> None:
        self.noise = RowNoise(alpha, seed)

    def on_train_begin(self, trainer: Trainer) -> None:
        self.noise.step = trainer.state.step
        trainer.execution.layers.noise = self.noise

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.noise.step = trainer.state.step
