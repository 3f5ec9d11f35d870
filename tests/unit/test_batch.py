"""Packed batches, with and without shared beginnings or padding: the loss and the gradients of each row alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from arriero.data.batch import Batch, group_by_prefix, pack, to_common_shape
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.sft import IGNORE, Example
from arriero.models.attention import AttentionInfo, apart_is_cheaper, attention
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.loss import LossSums, linear_cross_entropy


def row(prompt: list[int], answer: list[int]) -> Example:
    ids = prompt + answer
    return Example(ids, [IGNORE] * (len(prompt) - 1) + answer + [IGNORE])


@pytest.fixture
def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 96, (count,), generator=generator).tolist()

    first, second = tokens(40), tokens(30)
    questions = [(first, 7), (second, 5), (first, 3), (tokens(12), 6), (first, 11), (second, 4)]
    return [row(passage + tokens(extra), tokens(1 + extra % 4)) for passage, extra in questions]


def model(**changes: object) -> LlamaForCausalLM:
    config = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    } | changes
    made = LlamaForCausalLM(LlamaConfig.from_dict(config))
    made.init_weights(0)
    return made


def batch_loss(net: LlamaForCausalLM, batch: Batch) -> LossSums:
    hidden = net.hidden_states(batch.input_ids, attention=batch.attention())
    return linear_cross_entropy(hidden, net.lm_head.weight, batch.labels)


def gradients(net: LlamaForCausalLM, work: Callable[[], torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    net.zero_grad()
    loss = work()
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 9}], ids=["plain", "window"])
def test_shared_beginnings_give_the_loss_and_gradients_of_separate_rows(
    rows: list[Example], changes: dict[str, object]
) -> None:
    net = model(**changes)
    shared = pack(rows, share_prefixes=True)
    assert [len(parts) for parts in shared.parts] == [4, 3, 1]
    assert shared.input_ids.numel() < shared.row_tokens == sum(len(r.input_ids) for r in rows)
    loss, grads = gradients(net, lambda: batch_loss(net, shared).loss)

    def alone() -> torch.Tensor:  # plain causal attention and torch's own cross-entropy, row by row
        total = torch.zeros(())
        for example in rows:
            logits = net(torch.tensor([example.input_ids]))[0]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.labels), ignore_index=IGNORE, reduction="sum"
            )
        return total

    expected, expected_grads = gradients(net, alone)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_a_learned_token_is_never_shared(rows: list[Example]) -> None:
    for shared, members in group_by_prefix(rows):
        for member in members:
            assert all(label == IGNORE for label in member.labels[:shared])
            assert member.input_ids[:shared] == members[0].input_ids[:shared]


def test_the_labels_of_a_row_are_scanned_once_however_many_it_is_compared_with() -> None:
    scans: list[int] = []

    class Labels(list[int]):
        def __iter__(self) -> Iterator[int]:
            scans.append(id(self))
            return super().__iter__()

    rows = [Example([first, 2, 3], Labels([IGNORE, 3, IGNORE])) for first in range(20)]
    assert len(group_by_prefix(rows)) == 20
    assert sorted(scans) == sorted(id(row.labels) for row in rows)
    example = row([1, 2], [3])
    assert (example.prompt_length, example.label_count) == (2, 1)
    again = copy.deepcopy(example)  # by the protocol of pickles
    assert (again, again.prompt_length) == (row([1, 2], [3]), 2)
    assert replace(example, labels=[2, 3, IGNORE]).prompt_length == 1


def test_identical_rows_keep_a_token_of_their_own() -> None:
    twin = row(list(range(5, 45)), [7, 8])
    batch = pack([twin, twin], share_prefixes=True)
    assert batch.parts == ((39, 3, 3),)
    net = model()
    with torch.no_grad():
        once, twice = (float(batch_loss(net, made).loss) for made in (pack([twin]), batch))
    assert twice == pytest.approx(2 * once, rel=1e-6)


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("window", [None, 3, 80])
@pytest.mark.parametrize(
    ("documents", "apart"),
    [
        ([(6, 3, 4), (5,), (2, 3)], False),
        ([(30, 90, 55, 1, 70), (5,), (20, 100, 60, 40)], True),
        ([(30, 90, 55, 70)], True),
    ],
)
def test_branching_attention_equals_the_reference_backend(
    documents: list[tuple[int, ...]], apart: bool, window: int | None, prefix: int
) -> None:
    assert apart_is_cheaper(documents[0], prefix) is apart
    generator = torch.Generator().manual_seed(1)
    info = AttentionInfo.branching(documents).with_prefix(prefix)
    queries, keys = sum(map(sum, documents)), sum(map(sum, documents)) + prefix * len(documents)
    inputs = [torch.randn(1, h, n, 16, generator=generator) for h, n in ((4, queries), (2, keys), (2, keys))]
    results = []
    for backend in (None, "reference"):
        query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
        output = attention(query, key, value, info, scale=0.25, sliding_window=window, backend=backend)
        output.square().sum().backward()
        results.append((output.detach(), query.grad, key.grad, value.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_positions_of_a_branching_row() -> None:
    info = AttentionInfo.branching([(6, 3, 4), (5,), (2, 3)])
    assert info.positions(23, torch.device("cpu"))[0].tolist() == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_clusters_hold_every_row_once_and_steps_visit_each_once(rows: list[Example]) -> None:
    others = [Example([70 + i, 1], [1, IGNORE]) for i in range(18)]  # three rows of 24 may be of one passage
    ordered = [rows[i] for i in (0, 2, 4, 1, 5, 3)]
    clusters = prefix_clusters([*ordered, *others], largest=2)
    assert clusters == [[0, 1], [2], [3, 4], [5], *([i] for i in range(6, 24))]
    clusters = clusters[:4]
    order = StepOrder(6, 2, 2, seed=1, clusters=clusters)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(r for step in steps for micro in order(step) for r in micro) == list(range(6))


def matrix(rows: int, length: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 96, (rows, length + 1), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:], ((length,),) * rows, rows, rows * length, rows * length)


def exact(net: LlamaForCausalLM, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients in double precision, with torch's own cross-entropy."""

    def work() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logits = net(batch.input_ids, attention=batch.attention()).flatten(0, 1)
            total = total + F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total

    return gradients(net.double(), work)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 9},
        # rows longer than its context: an added token would turn all angles of its row
        {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ],
    ids=["plain", "window", "dynamic rope"],
)
@pytest.mark.parametrize("multiple", [1, 8])
def test_padding_changes_neither_loss_nor_gradients(
    rows: list[Example], changes: dict[str, object], multiple: int
) -> None:
    net = model(**changes)
    packed = [pack(rows[:2]), pack(rows[2:5], share_prefixes="rope_scaling" not in changes), pack(rows[5:])]
    steps = {
        "packed": packed,
        "one row each": [pack([row]) for row in rows[3:]],
        "matrices": [matrix(3, 16), matrix(2, 16, seed=1)],
        "matrices that need more columns": [matrix(3, 11), matrix(1, 11, seed=1)],
        "mixed": [*packed, matrix(2, 16)],
    }
    for name, batches in steps.items():
        common = to_common_shape([*batches, Batch.empty()], multiple)
        assert {batch.input_ids.shape for batch in common} == {common[0].labels.shape}, name
        assert common[0].input_ids.shape[1] % multiple == 0, name
        for before, after in zip([*batches, Batch.empty()], common, strict=True):
            assert (after.rows, after.row_tokens, after.label_tokens) == (
                before.rows,
                before.row_tokens,
                before.label_tokens,
            )
            assert int((after.labels != IGNORE).sum()) == after.label_tokens
            assert sum(map(sum, after.parts)) == after.input_ids.numel()
        loss, grads = exact(net, common)
        expected, expected_grads = exact(net, batches)
        # lengths become angles in fp32, whose power rounds otherwise in a tensor of another size
        limit = 1e-6 if "rope_scaling" in changes else 1e-12
        assert loss == pytest.approx(expected, rel=limit), name
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert (ours - theirs).norm() < limit * theirs.norm(), name


def test_what_fits_keeps_its_form() -> None:
    full, half = to_common_shape([matrix(4, 16), matrix(2, 16)], 8)
    assert full.parts == half.parts == ((16,),) * 4
    assert full.input_ids.equal(matrix(4, 16).input_ids)
    assert half.attention().kind == "causal", "equal rows need no packing"
    empty = to_common_shape([Batch.empty(), matrix(4, 16)], 8)[0]
    assert (empty.input_ids.shape, empty.attention().kind) == ((4, 16), "causal")
    only = pack([row([5, 6], [7, 8])])
    assert to_common_shape([only], 4)[0].parts == ((4,),)
    assert to_common_shape([only, only], 3)[1].parts == ((4,), (2,))
    assert [batch.input_ids.shape for batch in to_common_shape([Batch.empty()] * 2, 4)] == [(1, 4)] * 2
    assert to_common_shape([]) == []


@given(lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=5), multiple=st.integers(1, 5))
def test_a_common_shape_is_the_smallest_there_is(lengths: list[list[int]], multiple: int) -> None:
    batches = [pack([row([5] * (n - 1), [6]) if n > 1 else row([5], []) for n in of_one]) for of_one in lengths]
    common = to_common_shape(batches, multiple)
    longest = max(map(sum, lengths), default=0)
    assert all(longest <= batch.input_ids.numel() < longest + multiple for batch in common)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="32 tokens do not fit in 31"):
        matrix(2, 16).fitted(31)
