"""Learning rate as a pure function of the step, so that there is nothing to save and nothing to go stale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from arriero.config.optimization import DECAY_SHAPES, SCHEDULES, OptimizationOptions
from arriero.errors import ConfigError

# Steps after which inverse_sqrt without a warm-up has fallen by sqrt(2); as in transformers.
INVERSE_SQRT_TIMESCALE = 10_000


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0, then decay to a floor.

    With t the share of the way from the end of the warm-up to `decay_steps`, the rate above the floor is, of its peak:
    linear ``1 - t``; cosine ``(1 + cos(pi t)) / 2`` (Loshchilov & Hutter 2017, arXiv:1608.03983); polynomial
    ``(1 - t)**power``; constant, constant_with_warmup 1. wsd (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays
    at the peak until the last `decay_ratio` of `decay_steps`, then falls in the given shape. inverse_sqrt has no end: the
    rate is ``peak * sqrt(warmup_steps / step)`` (as fairseq and transformers), but not below the floor.

    Attributes:
        kind: one of `SCHEDULES`.
        peak: learning rate after the warm-up.
        floor: learning rate at `decay_steps` and after.
        warmup_steps: steps of linear rise from 0, as in transformers: step number s has ``peak * s / warmup_steps``.
        decay_steps: step at which the floor is reached.
        decay_ratio: length of the decay of wsd as a share of `decay_steps`.
        decay_shape: of wsd, one of `DECAY_SHAPES`; 1-sqrt is ``1 - sqrt(t)`` (Hägele et al. 2024, arXiv:2405.18392).
        power: of polynomial.
    """

    kind: str
    peak: float
    floor: float
    warmup_steps: int
    decay_steps: int
    decay_ratio: float = 0.2
    decay_shape: str = "1-sqrt"
    power: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("lr_scheduler_type", self.kind, SCHEDULES),
            ("wsd_decay_shape", self.decay_shape, DECAY_SHAPES),
        ):
            if value not in known:
                raise ConfigError(f"{name} is '{value}': one of {', '.join(known)} is needed")
        if not (math.isfinite(self.peak) and self.peak >= 0.0):
            raise ConfigError(f"learning_rate is {self.peak}: a finite number of at least 0 is needed")
        if self.floor > self.peak:
            raise ConfigError(f"min_learning_rate {self.floor} is above learning_rate {self.peak}")

    @classmethod
    def from_options(cls, options: OptimizationOptions, total_steps: int) -> Self:
        """The schedule of a run of `total_steps`.

        Raises:
            ConfigError: if the warm-up would not end before the decay or the run, or not before the decay of wsd begins.
        """
        warmup = options.warmup_steps or math.ceil(options.warmup_ratio * total_steps)
        decay = options.decay_steps or total_steps
        if options.lr_scheduler_type == "constant":
            warmup = 0
        if warmup > min(decay, total_steps):
            raise ConfigError(
                f"the warm-up of {warmup} steps ends after the decay ({decay}) or the run ({total_steps} steps): "
                "lower --warmup_steps or --warmup_ratio, or raise --decay_steps"
            )
        options.check_decay(total_steps)
        return cls(
            options.lr_scheduler_type,
            options.learning_rate,
            options.min_learning_rate,
            warmup,
            decay,
            options.wsd_decay_ratio,
            options.wsd_decay_shape,
            options.lr_power,
        )

    def __call__(self, step: int) -> float:
        """The rate of optimizer step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind.startswith("constant"):
            return self.peak
        if self.kind == "inverse_sqrt":
            scale = self.warmup_steps or INVERSE_SQRT_TIMESCALE
            return max(self.floor, self.peak * math.sqrt(scale / (step - self.warmup_steps + scale)))
        begin = self.warmup_steps
        if self.kind == "wsd":
            begin = max(begin, self.decay_steps - round(self.decay_ratio * self.decay_steps))
        progress = min(1.0, max(0.0, (step - begin) / max(1, self.decay_steps - begin)))
        return self.floor + (self.peak - self.floor) * self._remaining(progress)

    def _remaining(self, progress: float) -> float:
        """What is left of the way from peak to floor, 1 to 0."""
        match self.decay_shape if self.kind == "wsd" else self.kind:
            case "linear":
                return 1.0 - progress
            case "polynomial":
                return float((1.0 - progress) ** self.power)
            case "1-sqrt":
                return 1.0 - math.sqrt(progress)
            case _:
                return 0.5 * (1.0 + math.cos(math.pi * progress))
