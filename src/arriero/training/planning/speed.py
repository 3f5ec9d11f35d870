"""Arithmetic and time of a step, by the counting of `training/flops.py`."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.training.flops import StepCost
from arriero.training.planning.setup import ModelFacts, TrainingSetup


@dataclass(frozen=True)
class Speed:
    """Work of an optimizer step, every token being a label.

    Attributes:
        forward_per_token, training_per_token: FLOPs that the model needs, in the mean over a row.
        recomputed_per_token: FLOPs of what is computed a second time.
        step_tokens: tokens of a step on all devices.
        step_seconds: None where the device's FLOP/s are not known.
    """

    forward_per_token: float
    training_per_token: float
    recomputed_per_token: float
    step_tokens: int
    step_seconds: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together."""
        return None if self.step_seconds is None else self.step_tokens / self.step_seconds

    def seconds(self, tokens: float) -> float | None:
        """Time for so many tokens."""
        return None if self.step_seconds is None else tokens / self.step_tokens * self.step_seconds


def training_speed(facts: ModelFacts, setup: TrainingSetup, flops: float | None, utilization: float) -> Speed:
    """What a step costs and takes.

    Args:
        flops: peak FLOP/s of one device, or None.
        utilization: the share of it that is reached; recomputed work counts as work.
    """

    def per_token(cost: StepCost) -> float:
        return cost([(setup.sequence,)], setup.sequence) / setup.sequence

    again = {"none": None, "core_attn": facts.attention, "full": facts.blocks}[setup.recompute]
    recomputed = per_token(again) if again else 0.0
    needed = per_token(facts.training)
    device_tokens = setup.tokens * setup.accumulation
    seconds = None if flops is None else (needed + recomputed) * device_tokens / (flops * utilization)
    return Speed(per_token(facts.forward), needed, recomputed, device_tokens * setup.devices, seconds)
