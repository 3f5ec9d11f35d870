"""Every attention backend against the written-out softmax, and that one against a loop over queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arriero.models.attention import AttentionInfo, attention, choose_backend


def inputs(
    batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, dim, generator=generator)
    key, value = (torch.randn(batch, groups, keys, dim, generator=generator) for _ in range(2))
    return query.to(device), key.to(device), value.to(device)


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: Any, scale: float) -> torch.Tensor:
    """Plain loops: `allowed(batch, query, key)` says who sees whom."""
    batch, heads, queries, dim = query.shape
    output = torch.zeros(batch, heads, queries, dim)
    share = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(key.shape[2]) if allowed(b, i, j)]
                scores = [scale * float(query[b, h, i] @ key[b, h // share, j]) for j in seen]
                top = max(scores, default=0.0)
                weights = [math.exp(score - top) for score in scores]
                for j, weight in zip(seen, weights, strict=True):
                    output[b, h, i] += weight / sum(weights) * value[b, h // share, j]
    return output


WINDOWS = [None, 1, 3, 100]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "repeated"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7), (1, 7), (1, 1)])
def test_causal(queries: int, keys: int, window: int | None, backend: Any) -> None:
    query, key, value = inputs(2, 6, 2, queries, keys, 5)
    got = attention(query, key, value, AttentionInfo.causal(), scale=0.3, sliding_window=window, backend=backend)

    def allowed(_: int, i: int, j: int) -> bool:
        at = i + keys - queries
        return j <= at and (window is None or j > at - window)

    torch.testing.assert_close(got, by_hand(query, key, value, allowed, 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "repeated"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("lengths", "kv_lengths"),
    [([4, 1, 6], None), ([11], None), ([2, 1, 3], [2, 5, 7]), ([3], [8]), ([1, 1], [4, 1])],
)
def test_documents(lengths: list[int], kv_lengths: list[int] | None, window: int | None, backend: Any) -> None:
    keys = kv_lengths or lengths
    query, key, value = inputs(1, 3, 1, sum(lengths), sum(keys), 4)
    info = AttentionInfo.documents(lengths, kv_lengths)
    got = attention(query, key, value, info, scale=0.5, sliding_window=window, backend=backend)
    of_query = [(d, i + keys[d] - lengths[d]) for d in range(len(lengths)) for i in range(lengths[d])]
    of_key = [(d, j) for d in range(len(keys)) for j in range(keys[d])]

    def allowed(_: int, i: int, j: int) -> bool:
        (document, at), (other, position) = of_query[i], of_key[j]
        return document == other and position <= at and (window is None or position > at - window)

    torch.testing.assert_close(got, by_hand(query, key, value, allowed, 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "repeated"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("given_positions", [False, True])
def test_masked(given_positions: bool, window: int | None, backend: Any) -> None:
    query, key, value = inputs(3, 4, 2, 3, 6, 4)
    mask = torch.rand(3, 1, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[1, 0, 2] = False  # a query that sees nothing yields zeros
    positions = torch.tensor([[3, 4, 5], [0, 2, 4], [1, 1, 2]]) if given_positions else None
    info = AttentionInfo.masked(mask, positions)
    got = attention(query, key, value, info, scale=0.4, sliding_window=window, backend=backend)

    def allowed(b: int, i: int, j: int) -> bool:
        at = i + 3 if positions is None else int(positions[b, i])
        return bool(mask[b, 0, i, j]) and (window is None or j > at - window)

    torch.testing.assert_close(got, by_hand(query, key, value, allowed, 0.4), atol=1e-5, rtol=0)


def test_padded_rows_see_real_tokens_only() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
    ]
    dense = AttentionInfo.padded(mask).mask
    assert dense is not None
    assert dense[:, 0].int().tolist() == expected


@pytest.mark.parametrize("window", [None, 3])
def test_documents_gradients(window: int | None) -> None:
    lengths = [4, 1, 6]
    gradients = []
    for backend in ("reference", "sdpa", "repeated"):
        leaves = [x.requires_grad_() for x in inputs(1, 6, 2, 11, 11, 4)]
        info = AttentionInfo.documents(lengths)
        output = attention(*leaves, info, scale=0.5, sliding_window=window, backend=backend)  # type: ignore[arg-type]
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for others in zip(*gradients, strict=True):
        for mine in others[1:]:
            torch.testing.assert_close(mine, others[0], atol=2e-3, rtol=1e-5)


def test_masks_are_made_once_a_batch() -> None:
    info = AttentionInfo.documents([3, 4])
    cpu = torch.device("cpu")
    assert info.dense_mask(7, 7, 2, cpu) is info.dense_mask(7, 7, 2, cpu)
    assert info.document_mask(3, 3, 2, cpu) is info.document_mask(3, 3, 2, cpu)
    assert info.document_mask(3, 3, None, cpu) is None  # is_causal says it
    assert info.document_mask(3, 3, 3, cpu) is None  # the window cuts nothing


def test_positions_and_lengths_of_documents() -> None:
    cpu = torch.device("cpu")
    info = AttentionInfo.documents([2, 1, 2], [2, 4, 3])
    assert info.positions(5, cpu).tolist() == [[0, 1, 3, 1, 2]]
    lengths = info.sequence_lengths(cpu)
    assert lengths is not None
    assert lengths.tolist() == [[2, 2, 4, 3, 3]]
    assert AttentionInfo.causal().positions(3, cpu).tolist() == [[0, 1, 2]]
    assert AttentionInfo.causal().sequence_lengths(cpu) is None


@pytest.mark.parametrize(("lengths", "kv_lengths"), [([], None), ([0, 2], None), ([3], [2]), ([1, 2], [3])])
def test_impossible_documents(lengths: list[int], kv_lengths: list[int] | None) -> None:
    with pytest.raises(ValueError, match="documents need lengths"):
        AttentionInfo.documents(lengths, kv_lengths)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 2, 2), torch.ones(2, 2, dtype=torch.bool)])
def test_impossible_mask(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an attention mask must be bool"):
        AttentionInfo.masked(mask)


def test_backend_on_cpu_and_varlen_misuse() -> None:
    query, key, value = inputs(1, 2, 2, 4, 4, 4)
    assert choose_backend(query, AttentionInfo.documents([2, 2])) == "sdpa"
    with pytest.raises(ValueError, match="varlen backend needs documents"):
        attention(query, key, value, AttentionInfo.causal(), scale=1.0, backend="varlen")


def test_output_layout_spares_a_copy() -> None:
    # As the projections give them: (B, S, heads, D), seen transposed.
    query, key, value = (torch.randn(1, 9, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    for info in (AttentionInfo.causal(), AttentionInfo.documents([4, 5])):
        output = attention(query, key, value, info, scale=1.0)
        assert output.shape == (1, 4, 9, 8)
        assert output.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["varlen", "sdpa", None])
@pytest.mark.parametrize("kv_lengths", [None, [40, 1, 33]])
def test_documents_on_cuda(kv_lengths: list[int] | None, backend: Any, window: int | None) -> None:
    lengths = [17, 1, 33]
    total = sum(kv_lengths or lengths)
    query, key, value = (x.to(torch.bfloat16) for x in inputs(1, 8, 2, sum(lengths), total, 64, "cuda"))
    info = AttentionInfo.documents(lengths, kv_lengths)
    got = attention(query, key, value, info, scale=0.125, sliding_window=window, backend=backend)
    expected = attention(query, key, value, info, scale=0.125, sliding_window=window, backend="reference")
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    assert choose_backend(query, info) == "varlen"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_document_gradients_on_cuda(window: int | None) -> None:
    lengths = [17, 1, 33]
    gradients = []
    for backend in ("reference", "varlen"):
        tensors = inputs(1, 8, 2, sum(lengths), sum(lengths), 64, "cuda")
        leaves = [x.to(torch.bfloat16).requires_grad_() for x in tensors]
        info = AttentionInfo.documents(lengths)
        attention(*leaves, info, scale=0.125, sliding_window=window, backend=backend).sum().backward()  # type: ignore[arg-type]
        gradients.append([leaf.grad for leaf in leaves])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-2, rtol=5e-2)
