"""Micro-batches by tokens, mixtures and length groups: no row lost, none doubled, shares kept, nothing but (seed, step)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arriero.data.batch import pad
from arriero.data.filling import fill
from arriero.data.mixture import Mixture
from arriero.data.order import StepOrder, grouped_by_length
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import DataShare, FinetuningSteps
from arriero.errors import DataError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths=LENGTHS, room=st.integers(0, 200), processes=st.integers(1, 5))
def test_every_row_once_and_no_group_too_full(lengths: list[int], room: int, processes: int) -> None:
    budget = max(lengths) + room
    groups = fill(lengths, budget, processes)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in group) for group in groups]
    assert max(tokens) <= budget
    assert tokens == sorted(tokens, reverse=True)
    assert len(groups) % processes == 0 or all(len(group) == 1 for group in groups)
    if processes == 1 and len(groups) > 1:
        assert tokens[-1] + tokens[-2] > budget, "two of the emptiest would have fitted into one"
    assert groups == fill(lengths, budget, processes)


@given(
    lengths=LENGTHS,
    room=st.integers(0, 100),
    processes=st.integers(1, 3),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_a_step_has_the_same_rows_and_tokens_however_it_is_cut(
    lengths: list[int], room: int, processes: int, micro: int, accumulation: int, seed: int
) -> None:
    rows = len(lengths)
    by_rows = StepOrder(rows, micro, accumulation, seed, processes=processes)
    by_tokens = StepOrder(
        rows, micro, accumulation, seed, processes=processes, lengths=lengths, max_tokens=max(lengths) + room
    )
    examples = [Example([row + 1] * length, [row + 1] * length) for row, length in enumerate(lengths)]
    for step in range(by_rows.steps_per_epoch):
        wanted = sorted(row for batch in by_rows(step) for row in batch)
        assert sorted(row for batch in by_tokens(step) for row in batch) == wanted
        shares = [
            FinetuningSteps(examples, by_tokens, share=DataShare(rank, processes))(step) for rank in range(processes)
        ]
        assert len({len(share) for share in shares}) == 1, "every process has as many"
        real = [batch for share in shares for batch in share if batch.rows]
        tokens = Counter(token for batch in real for token in batch.input_ids.flatten().tolist())
        assert tokens == Counter({row + 1: lengths[row] for row in wanted})
        assert all(batch.input_ids.numel() <= max(lengths) + room for batch in real)


def test_a_row_that_fits_nowhere_is_named() -> None:
    with pytest.raises(DataError, match=r"row 1 .* has 9 tokens, --max_tokens_per_batch allows 8"):
        StepOrder(3, 1, 1, 0, lengths=[4, 9, 5], max_tokens=8)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_shares_of_a_mixture(counts: list[int], weights: list[float], seed: int) -> None:
    chosen = weights[: len(counts)]
    total = sum(counts)
    assume(all(total * weight / sum(chosen) >= 1 for weight in chosen))
    mixture = Mixture(tuple(counts), tuple(chosen))
    assert sum(mixture.quotas) == total
    first = 0
    for part, (count, weight) in enumerate(zip(counts, chosen, strict=True)):
        quota = mixture.quotas[part]
        assert abs(quota - total * weight / sum(chosen)) < 1
        own = range(first, first + count)
        drawn = [row for epoch in range(6) for row in mixture.epoch(epoch, seed) if row in own]
        assert len(drawn) == 6 * quota
        times = Counter(drawn)
        seen = [times[row] for row in own]
        assert max(seen) - min(seen) <= 1, "no row comes again before all of its data set came"
        first += count


def test_a_mixture_is_a_function_of_seed_and_step() -> None:
    mixture = Mixture((10, 4), (0.5, 0.5))

    def order(seed: int = 3) -> StepOrder:
        return StepOrder(14, 2, 1, seed, mixture=mixture)

    one = order()
    forwards = [one(step) for step in range(21)]
    other = order()
    assert [other(step) for step in reversed(range(21))] == forwards[::-1]
    assert forwards[:7] != forwards[7:14], "each epoch is shuffled anew"
    assert forwards != [order(4)(step) for step in range(21)]
    assert order().variation() == {"mixture": {"rows": [10, 4], "weights": [0.5, 0.5]}}
    with pytest.raises(DataError, match="data set number 2"):
        Mixture((10, 4), (1.0, 0.001))


def test_length_groups_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    generator = torch.Generator().manual_seed(1)
    for rows, step in ((3, 2), (40, 4), (401, 4), (1000, 3)):
        lengths = torch.randint(1, 10_000, (rows,), generator=generator).tolist()
        order = torch.randperm(rows, generator=generator)
        monkeypatch.setattr(torch, "randperm", lambda *_, order=order, **__: order)
        theirs = trainer.get_length_grouped_indices(lengths, step)
        assert grouped_by_length(order.tolist(), lengths, step) == theirs
        monkeypatch.undo()


@settings(max_examples=20)
@given(lengths=LENGTHS, seed=st.integers(0, 9))
def test_grouped_rows_are_the_rows(lengths: list[int], seed: int) -> None:
    order = StepOrder(len(lengths), 2, 2, seed, lengths=lengths, group_by_length=True)
    rows = [row for step in range(order.steps_per_epoch) for batch in order(step) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert lengths[rows[0]] == max(lengths), "the longest first"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_padding_is_known(lengths: list[int]) -> None:
    examples = [Example([7] * length, [7] * length) for length in lengths]
    batch = pad(examples)
    assert batch.input_ids.shape == (len(lengths), max(lengths))
    assert batch.row_tokens == sum(lengths) == batch.label_tokens
    assert (batch.labels != IGNORE).sum(1).tolist() == lengths
    real = batch.real()
    assert real is None or torch.equal(real, batch.labels != IGNORE)
    wider = batch.fitted(batch.input_ids.numel() + 3)
    real = wider.real()
    assert real is not None
    assert torch.equal(real, wider.labels != IGNORE)
