"""Learning rate as a pure function of the step, so that there is nothing to save and nothing to go stale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from arriero.errors import ConfigError

KINDS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0, then decay to a floor.

    Attributes:
        kind: one of `KINDS`.
        peak: learning rate after the warm-up.
        floor: learning rate at `decay_steps` and after.
        warmup_steps: steps of linear rise from 0, as in transformers: step number s has ``peak * s / warmup_steps``.
        decay_steps: step at which the floor is reached.
    """

    kind: str
    peak: float
    floor: float
    warmup_steps: int
    decay_steps: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"lr_scheduler_type is '{self.kind}': one of {', '.join(KINDS)} is needed")
        if not (math.isfinite(self.peak) and self.peak >= 0.0):
            raise ConfigError(f"learning_rate is {self.peak}: a finite number of at least 0 is needed")
        if self.floor > self.peak:
            raise ConfigError(f"min_learning_rate {self.floor} is above learning_rate {self.peak}")

    def __call__(self, step: int) -> float:
        """The rate of optimizer step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind.startswith("constant"):
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        remaining = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.floor + (self.peak - self.floor) * remaining
