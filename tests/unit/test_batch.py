"""Packed batches, with and without shared beginnings: the same loss and the same gradients as each row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arriero.data.batch import group_by_prefix, pack
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.sft import IGNORE, Example
from arriero.models.attention import AttentionInfo, attention
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.trainer import batch_loss


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
    made.init_weights(torch.Generator().manual_seed(0))
    return made


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


def test_identical_rows_keep_a_token_of_their_own() -> None:
    twin = row(list(range(5, 45)), [7, 8])
    batch = pack([twin, twin], share_prefixes=True)
    assert batch.parts == ((39, 3, 3),)
    net = model()
    assert float(batch_loss(net, batch).loss) == pytest.approx(2 * float(batch_loss(net, pack([twin])).loss), rel=1e-6)


def test_branching_attention_equals_the_reference_backend() -> None:
    generator = torch.Generator().manual_seed(1)
    info = AttentionInfo.branching([(6, 3, 4), (5,), (2, 3)])
    query, key, value = (torch.randn(1, heads, 23, 16, generator=generator) for heads in (4, 2, 2))
    for window in (None, 3):
        fast = attention(query, key, value, info, scale=0.25, sliding_window=window)
        plain = attention(query, key, value, info, scale=0.25, sliding_window=window, backend="reference")
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert info.positions(23, torch.device("cpu"))[0].tolist() == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_clusters_hold_every_row_once_and_steps_visit_each_once(rows: list[Example]) -> None:
    ordered = [rows[i] for i in (0, 2, 4, 1, 5, 3)]
    clusters = prefix_clusters(ordered, largest=2)
    assert clusters == [[0, 1], [2], [3, 4], [5]]
    order = StepOrder(6, 2, 2, seed=1, clusters=clusters)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        assert sorted(r for step in steps for micro in order(step) for r in micro) == list(range(6))
