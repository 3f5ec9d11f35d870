"""The order of the rows: every row once an epoch, and nothing but (seed, step) decides."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.data.order import StepOrder, describe_clusters, prefix_clusters
from arriero.data.sft import IGNORE, Example
from arriero.errors import DataError


@given(
    rows=st.integers(1, 60),
    micro=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_every_row_once_an_epoch(rows: int, micro: int, accumulation: int, seed: int, epoch: int) -> None:
    order = StepOrder(rows, micro, accumulation, seed)
    start = epoch * order.steps_per_epoch
    steps = [order(step) for step in range(start, start + order.steps_per_epoch)]
    assert sorted(row for step in steps for batch in step for row in batch) == list(range(rows))
    for step in steps:
        assert 1 <= len(step) <= accumulation
        assert all(len(batch) == micro for batch in step[:-1])
        assert 1 <= len(step[-1]) <= micro
    assert all(len(step) == accumulation for step in steps[:-1]), "only an epoch's last step may be smaller"


@given(step=st.integers(0, 500), seed=st.integers(0, 1000))
def test_a_step_does_not_depend_on_what_was_asked_before(step: int, seed: int) -> None:
    fresh = StepOrder(17, 2, 3, seed)(step)
    used = StepOrder(17, 2, 3, seed)
    for other in (step + 40, 0, step):
        again = used(other)
    assert again == fresh
    again[0].clear()
    assert used(step) == fresh, "what is handed out is a copy"


def test_accumulation_does_not_change_the_rows_of_a_step() -> None:
    orders = [StepOrder(23, micro, accumulation, 5) for micro, accumulation in ((1, 4), (2, 2), (4, 1))]
    for step in range(20):
        rows = [[row for batch in order(step) for row in batch] for order in orders]
        assert rows[0] == rows[1] == rows[2]


def test_processes_count_as_accumulation() -> None:
    one, three = StepOrder(41, 2, 6, 5), StepOrder(41, 2, 2, 5, processes=3)
    assert one.steps_per_epoch == three.steps_per_epoch
    assert [one(step) for step in range(9)] == [three(step) for step in range(9)]


def test_epochs_and_seeds_differ_and_processes_do_not() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = StepOrder(50, 10, 1, seed)
        return [row for i in range(5) for row in order(number * 5 + i)[0]]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 1) != epoch(1, 0)
    code = "from arriero.data.order import StepOrder; print(StepOrder(50, 50, 1, 7)(3)[0])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(StepOrder(50, 50, 1, 7)(3)[0])


def test_file_order_and_an_empty_set() -> None:
    order = StepOrder(5, 2, 1, 0, shuffle=False)
    assert [order(i) for i in range(4)] == [[[0, 1]], [[2, 3]], [[4]], [[0, 1]]]
    with pytest.raises(DataError, match="empty"):
        StepOrder(0, 1, 1, 0)


def row(*prompt: int) -> Example:
    """A row with one learned token."""
    return Example([*prompt, 1], [IGNORE] * (len(prompt) - 1) + [1, IGNORE])


SYSTEMS = [list(range(start, start + 40)) for start in (100, 200, 300, 400)]


@pytest.mark.parametrize(
    "systems",
    [
        [SYSTEMS[0]] * 256,
        [SYSTEMS[i // 64] for i in range(256)],  # one after another
        [SYSTEMS[i * 7 % 4] for i in range(256)],
        [SYSTEMS[0] if i % 100 else [] for i in range(256)],  # and rows without one
    ],
)
def test_a_system_message_of_many_rows_is_no_passage(systems: list[list[int]]) -> None:
    of_class = [i // 64 for i in range(256)]
    rows = [row(*system, 1000 + of_class[i], i % 5, 9) for i, system in enumerate(systems)]
    clusters = prefix_clusters(rows, 8)
    assert clusters == [[i] for i in range(256)]
    assert describe_clusters(clusters) == ""
    order = StepOrder(256, 8, 1, seed=3, clusters=clusters)
    again = StepOrder(256, 8, 1, seed=3, clusters=prefix_clusters(rows, 8))
    for epoch in range(3):
        batches = [order(epoch * 32 + step)[0] for step in range(32)]
        assert [again(epoch * 32 + step)[0] for step in reversed(range(32))] == batches[::-1]
        assert all(len({of_class[number] for number in batch}) > 1 for batch in batches)


@pytest.mark.parametrize("system", [[], SYSTEMS[0]])
def test_questions_on_one_passage_stay_together(system: list[int]) -> None:
    passages = [list(range(1000 * n, 1000 * n + 30 + n)) for n in range(1, 17)]
    rows = [row(*system, *passage, 7, question, 9) for passage in passages for question in range(5)]
    clusters = prefix_clusters(rows, 8)
    assert clusters == [list(range(5 * n, 5 * n + 5)) for n in range(16)]
    assert describe_clusters(clusters) == (
        "80 of 80 training rows begin alike in 16 groups, which are shuffled whole (--share_prefixes no: row by row)"
    )
    assert prefix_clusters(rows, 3) == [
        part for n in range(16) for part in (list(range(5 * n, 5 * n + 3)), [5 * n + 3, 5 * n + 4])
    ]


def test_what_rows_share_counts_beyond_what_many_rows_share() -> None:
    # a short passage after a long system message, and a long question after a short passage
    short = [row(*SYSTEMS[0], *range(1000 * n, 1000 * n + 20), 7, q, 9) for n in range(1, 13) for q in (1, 2)]
    assert len(prefix_clusters(short, 8)) == 12
    long = [row(*SYSTEMS[0], *range(1000 * n, 1000 * n + 20), q, *range(50)) for n in range(1, 13) for q in (1, 2)]
    assert len(prefix_clusters(long, 8)) == 24
