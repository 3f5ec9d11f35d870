"""The contiguous cache: what is stored where, and what comes back. With a model: tests/parity/test_models_logits.py."""

from __future__ import annotations

import pytest
import torch

from arriero.models.attention import AttentionInfo, attention
from arriero.models.cache import ContiguousCache
from arriero.models.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def new_tokens(batch: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, 2, size, 4, generator=generator) for _ in range(2))
    return key, value


def filled(lengths: list[int], max_length: int = 8, spare: int = 0) -> tuple[ContiguousCache, list[torch.Tensor]]:
    """A cache of prompts of these lengths and the keys of layer 1 of each, (KV, length, D)."""
    cache = ContiguousCache(CONFIG, len(lengths) + spare, max_length)
    key, value = new_tokens(1, sum(lengths), 1)
    view = cache.prefill(range(len(lengths)), lengths)
    for layer in range(2):
        view.update(layer, key * (layer + 1), value)
    return cache, list((key * 2)[0].split(lengths, dim=1))


def held(cache: ContiguousCache, row: int) -> torch.Tensor:
    """Layer 1's keys of a row as a decode step shows them, without the new one."""
    view = cache.decode([row])
    keys, _ = view.update(1, *new_tokens(1, 1, 9))
    return keys[0, :, : cache.lengths[row]]


def test_prefill_returns_its_input_and_stores_each_document_in_its_row() -> None:
    cache = ContiguousCache(CONFIG, 3, 8)
    key, value = new_tokens(1, 7, 0)
    view = cache.prefill([2, 0], [5, 2])
    got_key, got_value = view.update(0, key, value)
    assert got_key is key
    assert got_value is value
    assert view.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert view.attention.lengths == (5, 2)
    assert cache.lengths == [2, 0, 5]
    step = cache.decode()
    keys, _ = step.update(0, *new_tokens(3, 1, 5))
    assert keys.shape == (3, 2, 6, 4)
    assert torch.equal(keys[2, :, :5], key[0, :, :5])
    assert torch.equal(keys[0, :, :2], key[0, :, 5:])


def test_decode_appends_at_each_rows_length() -> None:
    cache, prompts = filled([3, 1])
    key, value = new_tokens(2, 1, 2)
    step = cache.decode()
    assert step.positions.tolist() == [[3], [1]]
    assert cache.decode_mask().int()[:, 0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert step.attention.mask is not None
    assert torch.equal(step.attention.mask, cache.decode_mask())
    keys, _ = step.update(1, key, value)
    assert torch.equal(keys[0], torch.cat((prompts[0], key[0]), dim=1))
    assert torch.equal(keys[1, :, :2], torch.cat((prompts[1], key[1]), dim=1))
    assert cache.lengths == [3, 1]
    cache.advance()
    assert cache.lengths == [4, 2]
    cache.advance()  # no step is pending
    assert cache.lengths == [4, 2]


def test_rows_of_equal_length_need_no_mask() -> None:
    cache, _ = filled([2, 2])
    assert cache.decode().attention.kind == "causal"


def test_decode_of_some_rows() -> None:
    cache, prompts = filled([3, 1, 2])
    key, value = new_tokens(2, 1, 3)
    step = cache.decode([2, 0])
    keys, values = step.update(1, key, value)
    assert step.positions.tolist() == [[2], [3]]
    assert torch.equal(keys[0, :, :3], torch.cat((prompts[2], key[0]), dim=1))
    assert torch.equal(keys[1], torch.cat((prompts[0], key[1]), dim=1))
    assert torch.equal(values[1, :, 3], value[1, :, 0])
    assert torch.equal(cache.decode_mask([2, 0]), step.attention.mask)
    cache.advance()
    assert cache.lengths == [4, 1, 3]


def test_masked_slots_do_not_reach_the_result() -> None:
    cache, _ = filled([3, 1])
    step = cache.decode()
    keys, values = step.update(0, *new_tokens(2, 1, 4))
    query = torch.randn(2, 4, 1, 4)
    both = attention(query, keys, values, step.attention, scale=0.5)
    short = attention(query[1:], keys[1:, :, :2], values[1:, :, :2], AttentionInfo.causal(), scale=0.5)
    torch.testing.assert_close(both[1:], short, atol=1e-6, rtol=0)
    assert torch.isfinite(both).all()


@pytest.mark.parametrize(
    "rows", [[0, 2, 3], [1, 3], [3], [3, 0], [2, 0, 1], [1, 0, 2], [2, 1, 0], [1, 1, 0], [], [0, 1, 2, 3]]
)
def test_select(rows: list[int]) -> None:
    cache, prompts = filled([3, 1, 4, 2])
    cache.select(rows)
    assert cache.batch == len(rows)
    assert cache.lengths == [prompts[row].shape[1] for row in rows]
    for target, row in enumerate(rows):
        assert torch.equal(held(cache, target), prompts[row])
    if rows:
        assert cache.decode().update(0, *new_tokens(len(rows), 1, 6))[0].shape[0] == len(rows)


def test_select_cannot_grow() -> None:
    cache, _ = filled([1, 1])
    with pytest.raises(ValueError, match="3 rows do not fit a cache of 2"):
        cache.select([0, 1, 1])


def test_copied_prefix_is_continued() -> None:
    cache, prompts = filled([5], spare=2)
    cache.copy_prefix(0, 1, 3)
    cache.copy_prefix(0, 2, 4)
    cache.copy_prefix(0, 0, 5)
    assert cache.lengths == [5, 3, 4]
    view = cache.prefill([1, 2], [2, 1], prefix_lengths=[3, 4])
    assert cache.lengths == [5, 5, 5]
    assert view.positions.tolist() == [[3, 4, 4]]
    assert view.attention.lengths == (2, 1)
    assert view.attention.kv_lengths == (5, 5)
    key, value = new_tokens(1, 3, 7)
    keys, values = view.update(1, key, value)
    expected = torch.cat((prompts[0][:, :3], key[0, :, :2], prompts[0][:, :4], key[0, :, 2:]), dim=1)
    assert torch.equal(keys[0], expected)
    assert torch.equal(values[0, :, 3:5], value[0, :, :2])


def test_what_cannot_be() -> None:
    cache, _ = filled([3, 8])
    with pytest.raises(ValueError, match=r"rows \[1\] are full: 8 tokens each"):
        cache.decode()
    with pytest.raises(ValueError, match="distinct rows"):
        cache.prefill([0, 0], [1, 1])
    with pytest.raises(ValueError, match="distinct rows"):
        cache.prefill([0, 1], [1])
    with pytest.raises(ValueError, match="9 tokens do not fit a row of 8"):
        cache.prefill([0], [9])
    with pytest.raises(ValueError, match="row 0 holds 3 tokens, fewer than the prefix of 4"):
        cache.prefill([0], [1], prefix_lengths=[4])
    with pytest.raises(ValueError, match="row 0 holds 3 tokens, fewer than 4"):
        cache.copy_prefix(0, 1, 4)
    assert cache.lengths == [3, 8]
