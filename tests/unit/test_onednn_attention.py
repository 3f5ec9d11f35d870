"""Attention in blocks of queries beside attention written out in fp64, by itself and where training and the engine call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.engine.runner import TorchRunner, Work
from arriero.models import onednn_attention, paged_cache, products
from arriero.models.attention import AttentionInfo, attention
from arriero.models.onednn_attention import causal_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from twin_models import twin_models

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Small blocks, on whatever processor the tests run, for any number of queries; queries and keys of each sequence."""
    shapes: list[tuple[int, int]] = []
    attend = onednn_attention.attend

    def told(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        shapes.append((query.shape[1], key.shape[1]))
        return attend(query, key, *rest)

    for module in (onednn_attention, paged_cache):
        monkeypatch.setattr(module, "attend", told)
    monkeypatch.setattr(onednn_attention, "STEP", 16)
    monkeypatch.setattr(onednn_attention, "FINE", 2)
    monkeypatch.setattr(onednn_attention, "LEAST_QUERIES", 2)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(paged_cache, "onednn_is_faster", lambda: True)
    with products.fast_products(one_shape=True):
        yield shapes


def drawn(batch: int, heads: int, kv_heads: int, queries: int, keys: int, size: int) -> list[Tensor]:
    """Laid out as layers make them."""
    torch.manual_seed(0)
    shapes = ((batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size))
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def written_out(given: list[Tensor], info: AttentionInfo, scale: float) -> list[Tensor]:
    """In fp64: the output, and the gradients of the sum of its products with numbers that `probe` gives."""
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    output = exact(wide, info, scale)
    (output * probe(output)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in wide if tensor.grad is not None)]


def exact(given: list[Tensor], info: AttentionInfo, scale: float) -> Tensor:
    query, key, value = given
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    seen = info.dense_mask(query.shape[2], key.shape[2], None, query.device)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


def probe(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def check(found: Tensor, given: list[Tensor], truth: list[Tensor]) -> None:
    (found * probe(found)).sum().backward()
    for ours, expected in zip([found, *(tensor.grad for tensor in given)], truth, strict=True):
        assert ours is not None
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "keys"),
    [
        (1, 4, 4, 64, 64),  # no groups, whole blocks
        (2, 6, 2, 45, 45),  # filled up behind
        (1, 6, 2, 20, 75),  # a beginning in the cache: filled up in front too
        (1, 6, 2, 16, 64),
        (1, 8, 1, 33, 300),  # keys in larger steps
        (1, 8, 2, 70, 70),
        (1, 40, 1, 20, 20),  # a group that makes a block smaller
        (1, 2, 1, 1, 5),
    ],
)
def test_values_and_gradients_are_those_of_fp64(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, called: list[tuple[int, int]]
) -> None:
    given = drawn(batch, heads, kv_heads, queries, keys, 8)
    found = causal_attention(*given, 0.3)
    assert found.transpose(1, 2).is_contiguous()
    check(found, given, written_out(given, AttentionInfo.causal(), 0.3))
    assert called == [(queries, keys)] * batch


@pytest.mark.parametrize(
    ("info", "documents"),
    [
        (AttentionInfo.causal(), [(90, 90)]),
        (AttentionInfo.documents([90]), [(90, 90)]),
        (AttentionInfo.documents([30, 30, 1, 29]), [(30, 30), (30, 30), (29, 29)]),
        (AttentionInfo.branching([[40, 10, 10], [30]]), [(30, 30)]),  # what branches has a mask
    ],
)
def test_training_calls_it(
    info: AttentionInfo, documents: list[tuple[int, int]], called: list[tuple[int, int]]
) -> None:
    given = drawn(1, 4, 2, 90, 90, 8)
    check(attention(*given, info, scale=0.3), given, written_out(given, info, 0.3))
    assert called == documents


@pytest.mark.parametrize(("groups", "block"), [(1, 128), (3, 128), (4, 64), (7, 32), (64, 16)])
def test_blocks_as_they_are(groups: int, block: int) -> None:
    """Without a fixture: rows that fit into the cache."""
    query, key = torch.randn(2 * groups, 300, 16), torch.randn(2, 700, 16)
    blocks = list(onednn_attention._Blocks(query, key, key, 0.25))
    assert {stop - start for _, start, stop, _ in blocks} == {block}
    found = onednn_attention.attend(query, key, key, 0.25)
    truth = exact([tensor[None].double() for tensor in (query, key, key)], AttentionInfo.causal(), 0.25)
    torch.testing.assert_close(found.double(), truth[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_numbers_of_keys_are_few() -> None:
    lengths = [onednn_attention.rounded(keys) for keys in range(1, 131_073)]
    assert len(set(lengths)) == 64
    assert all(keys <= length < 1.125 * keys + 128 for keys, length in enumerate(lengths, 1))


@pytest.mark.parametrize("info", [AttentionInfo.causal(), AttentionInfo.documents([90])])
def test_autocast_is_torchs_own(info: AttentionInfo, called: list[tuple[int, int]]) -> None:
    """Queries and keys are fp32 there, since they are rotated, and values are not."""
    query, key, value = (tensor.detach() for tensor in drawn(1, 4, 2, 90, 90, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(query, key, value.bfloat16(), info, scale=0.3)
    assert not called
    truth = exact([query.double(), key.double(), value.double()], info, 0.3)
    torch.testing.assert_close(found.double(), truth, rtol=0.05, atol=0.05)


def test_where_it_is_not_called(called: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window, other formats, few queries, a compiler, and code outside of a run."""
    given = [tensor.detach() for tensor in drawn(1, 4, 2, 40, 40, 8)]
    info = AttentionInfo.causal()
    attention(*given, info, scale=0.3, sliding_window=7)
    attention(*(tensor.double() for tensor in given), info, scale=0.3)
    attention(*(tensor[:, :, :1] for tensor in given), info, scale=0.3)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        attention(*given, info, scale=0.3)
        patched.undo()
        patched.setattr(products, "_active", False)
        attention(*given, info, scale=0.3)
    assert not called
    attention(*given, info, scale=0.3, sliding_window=40)
    assert called == [(40, 40)]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 30])
def test_the_engine_calls_it(window: int | None, scattered: bool, called: list[tuple[int, int]]) -> None:
    """Prompts in chunks beside each other, of which the cache holds what memory held before; transformers' logits."""
    family = {} if window is None else {"model_type": "mistral", "sliding_window": window, "head_dim": 8}
    ours, theirs = twin_models(max_position_embeddings=128, **family)
    vocabulary = ours.config.vocab_size
    lengths, ends = (100, 37), ((0, 0), (20, 5), (61, 37), (100, 37))
    tokens = [torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    blocks = [[row + 2 * i if scattered else 26 * row + i for i in range(26)] for row in range(2)]
    runner = TorchRunner(ours, block_size=4, max_tokens=4 * 52)
    for store in runner._cache.layers:
        store.fill_(torch.nan)
    found: list[list[Tensor]] = [[], []]
    for before, after in pairwise(ends):
        rows = [row for row in (0, 1) if before[row] < after[row]]
        work = [
            Work(tokens[row][before[row] : after[row]], before[row], blocks[row], after[row] - before[row])
            for row in rows
        ]
        parts = torch.split(runner.run(work), [item.logits for item in work])
        for row, part in zip(rows, parts, strict=True):
            found[row].append(part)
    for ids, parts in zip(tokens, found, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        assert (torch.cat(parts) - expected).abs().max() <= 1e-5 * expected.abs().max()
    layers = ours.config.num_hidden_layers
    whole = [(20, 20), (5, 5)] + [(41, 61), (32, 37)] + [(39, 100)]
    seen = whole if window is None else [(queries, keys) for queries, keys in whole if keys <= window]
    assert sorted(called) == sorted(seen * layers)
