"""The planned bubble and micro-batches in flight against torch's own orders of work, played in unit time."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from arriero.config.layout import Layout
from arriero.models.presets import find_preset
from arriero.training.planning.pipeline import distinct_shares, idle_share, runs_in_flight, shares
from arriero.training.planning.setup import TrainingSetup, model_facts

Work = tuple[str, int, int]  # kind, stage, micro-batch
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
CLASSES: dict[str, Any] = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


def orders(layout: Layout, micro_batches: int) -> list[list[Work]]:
    """What each process does, one thing after the other: torch's lists, made without processes."""
    if layout.schedule == "1f1b":  # torch has no list of it: section 2.2 of arXiv:2104.04473
        found = []
        for rank in range(layout.pp):
            ahead = min(layout.pp - 1 - rank, micro_batches)
            order: list[Work] = [("F", rank, number) for number in range(ahead)]
            for number in range(micro_batches):
                order += [("F", rank, number + ahead)] * (number + ahead < micro_batches) + [("B", rank, number)]
            found.append(order)
        return found
    kind = CLASSES[layout.schedule]
    plan = object.__new__(kind)
    rounds = max(1, micro_batches // layout.pp)
    values = {"pp_group_size": layout.pp, "n_local_stages": layout.virtual, "_n_microbatches": micro_batches}
    values |= {
        "num_stages": layout.stages,
        "number_of_rounds": rounds,
        "microbatches_per_round": micro_batches // rounds,
    }
    plan.__dict__.update(values)
    lists = [plan._calculate_single_rank_operations(rank) for rank in range(layout.pp)]
    return [
        [
            (KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in actions
            if action
        ]
        for actions in lists
    ]


@dataclass
class Played:
    length: float
    busy: list[float]
    in_flight: list[int]


def play(order: list[list[Work]], stages: int, cost: dict[str, float]) -> Played:
    """Each process does the next thing of its list as soon as it is free and what that needs is done."""
    done: dict[Work, float] = {}
    free, at, busy = [0.0] * len(order), [0] * len(order), [0.0] * len(order)
    alive, most = [0] * len(order), [0] * len(order)
    split = any(kind == "W" for actions in order for kind, _, _ in actions)
    while any(place < len(actions) for place, actions in zip(at, order, strict=True)):
        before = list(at)
        for rank, actions in enumerate(order):
            while at[rank] < len(actions):
                kind, stage, number = actions[at[rank]]
                needs: list[Work] = []
                if kind == "F" and stage:
                    needs = [("F", stage - 1, number)]
                elif kind in "BI":
                    needs = [("F", stage, number), *([(kind, stage + 1, number)] if stage + 1 < stages else [])]
                elif kind == "W":
                    needs = [("I", stage, number)]
                if not all(need in done for need in needs):
                    break
                start = max([free[rank], *(done[need] for need in needs)])
                free[rank] = done[(kind, stage, number)] = start + cost[kind]
                busy[rank] += cost[kind]
                alive[rank] += (kind == "F") - (kind == ("W" if split else "B"))
                most[rank] = max(most[rank], alive[rank])
                at[rank] += 1
        assert at != before, "the order of work waits for itself"
    return Played(max(free), busy, most)


LAYOUTS = [
    *[Layout(pp=pp, schedule="1f1b") for pp in (2, 4, 8)],
    *[
        Layout(pp=pp, virtual=virtual, schedule="interleaved")
        for pp, virtual in ((2, 2), (4, 1), (4, 2), (4, 5), (8, 2))
    ],
    *[Layout(pp=pp, virtual=virtual, schedule="zero_bubble") for pp, virtual in ((2, 1), (4, 1), (4, 3), (8, 2))],
    *[Layout(pp=pp, virtual=2, schedule="zbv") for pp in (2, 4, 8)],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_bubble_and_passes_in_flight_of_the_played_order(layout: Layout, recompute: bool) -> None:
    logging.disable(logging.WARNING)
    again = 1.0 if recompute else 0.0
    cost = {"F": 1.0, "B": 2.0 + again, "I": 1.0 + again, "W": 1.0}
    for micro_batches in (4 * layout.pp, 8 * layout.pp):
        played = play(orders(layout, micro_batches), layout.stages, cost)
        assert len(set(played.busy)) == 1
        waits = 1 - played.busy[0] / played.length
        assert idle_share(layout, micro_batches, recompute=recompute) == pytest.approx(waits, rel=1e-12)
        planned = [runs_in_flight(layout, micro_batches, rank) for rank in range(layout.pp)]
        assert planned == played.in_flight


def test_few_micro_batches_are_in_flight_at_most_all() -> None:
    layout = Layout(pp=8, schedule="1f1b")
    played = play(orders(layout, 3), 8, {"F": 1.0, "B": 2.0})
    assert played.in_flight == [3, 3, 3, 3, 3, 3, 2, 1] == [runs_in_flight(layout, 3, rank) for rank in range(8)]


@pytest.mark.parametrize(
    ("layout", "given", "run"),
    [
        (Layout(), 3, 3),
        (Layout(pp=4), 2, 4),
        (Layout(pp=4, virtual=2, schedule="interleaved"), 9, 12),
        (Layout(pp=4, schedule="zero_bubble"), 4, 4),
        (Layout(pp=4, virtual=2, schedule="zbv"), 4, 16),
    ],
)
def test_micro_batches_are_as_many_as_the_run_fills_up_to(layout: Layout, given: int, run: int) -> None:
    from arriero.training.pipeline_execution import PipelineExecution

    assert TrainingSetup(layout=layout, accumulation=given).micro_batches == run
    if layout.pp > 1:
        execution = object.__new__(PipelineExecution)
        execution.layout = layout
        assert execution._count(given) == run


def test_every_layer_and_both_ends_are_held_once() -> None:
    facts = model_facts(find_preset("llama-3.2-1b").config)
    for layout in (
        Layout(pp=4),
        Layout(pp=4, virtual=2, schedule="interleaved"),
        Layout(pp=4, virtual=2, schedule="zbv"),
    ):
        setup = TrainingSetup(layout=layout, accumulation=16)
        found = shares(facts, setup)
        assert sorted(layer for share in found for layer in share.layers) == list(range(16))
        assert [share.embedding for share in found] == [True, False, False, False]
        last = 0 if layout.schedule == "zbv" else 3
        assert [share.head for share in found].index(True) == last
        assert {len(share.layers) for share in distinct_shares(facts, setup)} == {len(share.layers) for share in found}
