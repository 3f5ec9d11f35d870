"""Arithmetic and time of a step, by the counting of `training/flops.py`, and what a layout adds by waiting."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from arriero.config.layout import Layout
from arriero.training.flops import StepCost
from arriero.training.planning.communication import Traffic, seconds, traffic
from arriero.training.planning.machine import Links
from arriero.training.planning.pipeline import Share, distinct_shares, idle_share
from arriero.training.planning.setup import ModelFacts, TrainingSetup


@dataclass(frozen=True)
class Speed:
    """Work of an optimizer step, every token being a label.

    Attributes:
        forward_per_token, training_per_token: FLOPs that the model needs, in the mean over a row.
        recomputed_per_token: FLOPs of what is computed a second time.
        step_tokens: tokens of a step on all devices.
        step_seconds: None where the device's FLOP/s are not known.
        busy_seconds: of it, the arithmetic of the slowest place of the pipeline.
        bubble_seconds: of it, the wait of a pipeline that fills and drains.
        waiting: of it, seconds of communication that nothing hides, by axis; empty where the links are not known.
        traffic: of the slowest place of the pipeline.
    """

    forward_per_token: float
    training_per_token: float
    recomputed_per_token: float
    step_tokens: int
    step_seconds: float | None
    busy_seconds: float | None = None
    bubble_seconds: float | None = None
    waiting: dict[str, float] = field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together."""
        return None if self.step_seconds is None else self.step_tokens / self.step_seconds

    def seconds(self, tokens: float) -> float | None:
        """Time for so many tokens."""
        return None if self.step_seconds is None else tokens / self.step_tokens * self.step_seconds

    def model_utilization(self, flops: float, devices: int) -> float | None:
        """MFU: the FLOP/s that the model needs over the devices' peak `flops`; recomputed work does not count."""
        rate = self.tokens_per_second
        return None if rate is None else rate * self.training_per_token / (flops * devices)


def training_speed(
    facts: ModelFacts, setup: TrainingSetup, flops: float | None, utilization: float, links: Links | None = None
) -> Speed:
    """What a step costs and takes.

    Args:
        flops: peak FLOP/s of one device, or None.
        utilization: the share of it that is reached while a device computes; recomputed work counts as work.
        links: what devices can send, or None: then communication takes no time.
    """

    def per_token(cost: StepCost) -> float:
        return cost([(setup.sequence,)], setup.sequence) / setup.sequence

    again = _again(facts, setup)
    found = Speed(
        per_token(facts.forward),
        per_token(facts.training),
        per_token(again) if again else 0.0,
        setup.step_tokens,
        None,
    )
    times = [_step(facts, setup, share, flops, utilization, links, found) for share in distinct_shares(facts, setup)]
    return max(times, key=lambda speed: speed.step_seconds or 0.0)


def _again(facts: ModelFacts, setup: TrainingSetup) -> StepCost | None:
    again = {"none": None, "core_attn": facts.attention, "full": facts.blocks}[setup.recompute]
    if setup.preference is None:
        return again
    # log-probabilities of pairs: the backward pass makes each chunk's logits once more
    head = facts.forward.per_label
    return StepCost(again.per_token, head, again.per_pair) if again else StepCost(0.0, head, 0.0)


def share_flops(facts: ModelFacts, setup: TrainingSetup, share: Share) -> float:
    """FLOPs of one micro-batch on the device at one place of the pipeline."""
    costs = [cost for cost in (facts.training, _again(facts, setup)) if cost is not None]
    pairs = setup.sequence * (setup.sequence + 1) / 2
    row = sum(cost.per_token * setup.sequence + cost.per_pair * pairs for cost in costs)
    row *= len(share.layers) / facts.config.num_hidden_layers
    if share.head:
        row += sum(cost.per_label for cost in costs) * setup.sequence
    return row * setup.batch / (setup.layout.tp * setup.layout.cp)


def _step(
    facts: ModelFacts,
    setup: TrainingSetup,
    share: Share,
    flops: float | None,
    utilization: float,
    links: Links | None,
    empty: Speed,
) -> Speed:
    """The step, if every place of the pipeline were as slow as this one."""
    layout, sent = setup.layout, traffic(facts, setup, share) if setup.layout.size > 1 else []
    if flops is None:
        return replace(empty, traffic=tuple(sent))
    busy = setup.micro_batches * share_flops(facts, setup, share) / (flops * utilization)
    waiting: dict[str, float] = defaultdict(float)
    for one in sent if links is not None else []:
        assert links is not None
        waiting[one.axis] += seconds(one, layout, links) * _exposed(one, layout, setup.micro_batches)
    # what runs beside the arithmetic is waited for as far as it outlasts it
    for axis in ("shard", "dp_replicate"):
        if layout.pp == 1 and axis in waiting:
            waiting[axis] = max(0.0, waiting[axis] - _window(setup) * busy)
    blocking = busy + waiting.get("tp", 0.0) + waiting.get("cp", 0.0)
    idle = idle_share(layout, setup.micro_batches, recompute=setup.recompute == "full")
    bubble = blocking * idle / (1 - idle)
    return replace(
        empty,
        step_seconds=busy + bubble + sum(waiting.values()),
        busy_seconds=busy,
        bubble_seconds=bubble,
        waiting=dict(waiting),
        traffic=tuple(sent),
    )


def _window(setup: TrainingSetup) -> float:
    """Share of a step's arithmetic beside which gradients and weights are sent: all of it, or that of one micro-batch."""
    return 1.0 if setup.layout.stage >= 2 else 1 / setup.micro_batches


def _exposed(one: Traffic, layout: Layout, micro_batches: int) -> float:
    """Share of its time that can not be hidden, before arithmetic is set against it.

    In a pipeline the state of a stage is sent when its last backward pass is done, beside the work of the process's other
    stages; hidden states go beside the next micro-batch's work, but for the filling and draining.
    """
    if one.axis == "pp":
        return min(1.0, (layout.pp - 1) / (micro_batches * layout.virtual))
    if one.hidden and layout.pp > 1:
        rounds = micro_batches if layout.stage == 3 and "weights" in one.what else 1
        return 1 / (layout.virtual * rounds)
    return 1.0
