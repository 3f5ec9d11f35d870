"""A decoder layer of one new token for each of a few sequences: a function of tensors alone, to be compiled as a whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.models.kv_format import KVFormat
from arriero.models.row_tiles import linear, products, stored


class LayerTiles(NamedTuple):
    """A layer's weights; matrices in tiles, see `row_tiles`."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class RowPlaces(NamedTuple):
    """Where each of R sequences lies and what is new of it.

    Attributes:
        cos, sin: (R, 1, D), of `RotaryEmbedding`.
        slots: (R, T) int64, of each sequence's tokens in order; behind them that of its last.
        lengths: (R,) int64, with the new tokens.
        new: (R,) int64, the slots of the new tokens.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    lengths: Tensor
    new: Tensor


class LayerFacts(NamedTuple):
    """What is compiled into a layer."""

    eps: float
    scale: float
    window: int | None
    format: KVFormat


def run_layer(
    hidden: Tensor, places: RowPlaces, store: Tensor, scales: Tensor | None, tiles: LayerTiles, facts: LayerFacts
) -> Tensor:
    """(R, hidden_size) -> the same; new keys and values are written.

    Args:
        store, scales: the layer's, of a `PagedCache`.
    """
    heads, size = store.shape[0], store.shape[2]
    kv = heads // 2
    x = _norm(hidden, tiles.input_norm, facts.eps)
    width = (tiles.output.shape[1] // size + heads) * size
    qkv = linear(x, tiles.qkv, width, tiles.qkv_bias).view(len(x), -1, size)
    query, key = qkv[:, :-heads], qkv[:, -heads:-kv]
    if tiles.q_norm is not None and tiles.k_norm is not None:
        query, key = _norm(query, tiles.q_norm, facts.eps), _norm(key, tiles.k_norm, facts.eps)
    query, key = _rotated(query, places), _rotated(key, places)
    codes, new_scales = facts.format.encode(torch.cat((key, qkv[:, -kv:]), 1))
    store.index_copy_(1, places.new, codes.transpose(0, 1))
    if scales is not None and new_scales is not None:
        scales.index_copy_(1, places.new, new_scales.transpose(0, 1))
    attended = _attend(query, places, store, scales, facts)
    hidden = hidden + linear(attended, tiles.output, hidden.shape[1], tiles.output_bias)
    x = _norm(hidden, tiles.post_norm, facts.eps)
    inner = [F.silu(_plus(gate, tiles.gate_bias)) * _plus(up, tiles.up_bias) for gate, up in products(x, tiles.gate_up)]
    fed = stored(torch.cat(inner).view(len(x), -1)[:, : tiles.down.shape[1]])
    return hidden + linear(fed, tiles.down, hidden.shape[1], tiles.down_bias)


def run_head(hidden: Tensor, norm: Tensor, tiles: Tensor, size: int, eps: float) -> Tensor:
    """(R, hidden_size) -> logits (R, size)."""
    return linear(_norm(hidden, norm, eps), tiles, size, None)


def _attend(query: Tensor, places: RowPlaces, store: Tensor, scales: Tensor | None, facts: LayerFacts) -> Tensor:
    """(R, H, D) -> (R, H D): a group's heads share the loops over its keys and over its values."""
    rows, heads, size = query.shape
    kv = len(store) // 2
    query = stored(query.reshape(rows, kv, heads // kv, size))
    held = scales[:, places.slots] if scales is not None else None
    numbers = facts.format.decode(store[:, places.slots], held, query.dtype).transpose(0, 1)  # (R, 2 KV, T, D)
    keys, values = numbers[:, :kv], numbers[:, kv:]
    at = torch.arange(places.slots.shape[1], device=query.device)
    seen = at < places.lengths[:, None]
    if facts.window is not None:
        seen = seen & (at >= places.lengths[:, None] - facts.window)
    scores = [(part[:, :, None] * keys).sum(-1) * facts.scale for part in query.unbind(2)]
    weights = [torch.where(seen[:, None], x, -math.inf).softmax(-1) for x in scores]
    # so that the compiler takes a register of a value's numbers, and not one number of many values
    columns = stored(torch.stack(weights).permute(1, 3, 0, 2)).unbind(2)  # (R, T, KV) each
    found = [(x.transpose(1, 2)[..., None] * values).sum(2) for x in columns]
    return stored(torch.stack(found, 2).view(rows, -1))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return stored(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def _rotated(x: Tensor, places: RowPlaces) -> Tensor:
    """See `rope.rotate`."""
    return x * places.cos + x.roll(x.shape[-1] // 2, -1) * places.sin


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
