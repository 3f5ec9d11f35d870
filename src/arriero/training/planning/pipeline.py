"""A pipeline's stages: what each process holds of them, how many micro-batches at once, and how long it stands idle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from arriero.config.layout import Layout
from arriero.parallel.pipeline import split_layers
from arriero.training.planning.setup import ModelFacts, TrainingSetup


@dataclass(frozen=True)
class Share:
    """What the process at one place of the pipeline holds.

    Attributes:
        pp: the place, from 0.
        layers: decoder layers of its stages.
        embedding, head: whether it has the first stage, the last one; the norm goes with the head.
        passes: forward passes of all its layers whose tensors it keeps at once.
    """

    pp: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool
    passes: float


def shares(facts: ModelFacts, setup: TrainingSetup) -> list[Share]:
    """Of every process of the pipeline, first to last.

    Raises:
        ConfigError: the model has fewer layers than the pipeline has stages.
    """
    layout = setup.layout
    plain = Layout(pp=layout.pp, virtual=layout.virtual, schedule=layout.schedule)
    return list(_shares(facts, plain, setup.sequence, setup.micro_batches))


@lru_cache(maxsize=1024)
def _shares(facts: ModelFacts, layout: Layout, sequence: int, micro_batches: int) -> tuple[Share, ...]:
    runs = split_layers(facts.config, layout.stages, sequence)
    found = []
    for pp in range(layout.pp):
        stages = layout.stages_of(pp)
        layers = tuple(layer for stage in stages for layer in runs[stage])
        runs_kept = runs_in_flight(layout, micro_batches, pp)
        passes = runs_kept / layout.virtual
        found.append(Share(pp, layers, 0 in stages, layout.stages - 1 in stages, passes))
    return tuple(found)


def distinct_shares(facts: ModelFacts, setup: TrainingSetup) -> list[Share]:
    """Of processes that hold alike, the one that keeps most."""
    greatest: dict[tuple[int, bool, bool], Share] = {}
    for share in shares(facts, setup):
        kind = (len(share.layers), share.embedding, share.head)
        if kind not in greatest or share.passes > greatest[kind].passes:
            greatest[kind] = share
    return list(greatest.values())


def runs_in_flight(layout: Layout, micro_batches: int, pp: int) -> int:
    """Forward passes of single stages that a process has begun and not finished the backward passes of, at the most.

    Those of torch's schedules (`torch.distributed.pipelining`), which the tests count. 1F1B: Narayanan et al. 2021
    (arXiv:2104.04473, section 2.2); the zero-bubble ones hold as much in every process (Qi et al. 2023, arXiv:2401.10241,
    section 2.3, and 2024, arXiv:2405.15362).
    """
    if layout.pp == 1:
        return 1
    most, after = micro_batches * layout.virtual, layout.pp - 1 - pp
    if layout.schedule == "1f1b":
        return min(after + 1, most)
    if layout.schedule == "zbv":
        return min(2 * layout.pp, most)
    in_a_round = micro_batches // max(1, micro_batches // layout.pp)
    ahead = (layout.virtual - 1) * in_a_round
    return min(ahead + (2 * after + 1 if layout.schedule == "interleaved" else layout.pp), most)


def idle_share(layout: Layout, micro_batches: int, *, recompute: bool = False) -> float:
    """Share of a step in which a process of the pipeline waits, every stage taking the same time.

    1F1B, of p processes and m micro-batches: (p - 1) / (m + p - 1), the step being m + p - 1 times the work of one
    micro-batch and m of them being work. With v stages in each process the wait is a v-th (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2). The zero-bubble orders put the gradients of weights, W, into it, and wait
    (p - 1)(F + B - W) (ZB-H1: Qi et al. 2023, arXiv:2401.10241, table 1); for ZBV with v = 2 that is what remains because a
    step ends for all processes at once (Qi et al. 2024, arXiv:2405.15362). F = B = W without recomputation, which adds F to B.
    """
    if layout.pp == 1:
        return 0.0
    forward, inner, weights = 1.0, 2.0 if recompute else 1.0, 1.0
    work = micro_batches * layout.virtual * (forward + inner + weights)
    one = forward + inner + (-weights if layout.schedule in ("zero_bubble", "zbv") else weights)
    wait = (layout.pp - 1) * one
    return wait / (work + wait)
