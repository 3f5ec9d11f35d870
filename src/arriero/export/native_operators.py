"""Operators of torch that compiled programs have native code for (`native_code`), in words: what the code must give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.export.integer_tiles import BLOCK, FACTORS, LEVELS, STEPS, untiled

LEAST = 1e-36  # a block without a larger number is taken for zeros
INTEGER_PRODUCT, CACHED_ATTENTION = "arriero::integer_product", "arriero::cached_attention"


@torch.library.custom_op(INTEGER_PRODUCT, mutates_args=())
def integer_product(x: Tensor, levels: Tensor, steps: Tensor, factors: Tensor, outputs: int) -> Tensor:
    """Rows times a matrix of `integer_tiles`, after each block of 32 inputs was rounded to 8 bits by a step of its own.

    Args:
        x: (rows, in) fp32.
        levels, steps, factors: of a matrix (outputs, in).
        outputs: of the product.

    Returns:
        (rows, outputs) fp32.
    """
    matrix = untiled({LEVELS: levels, STEPS: steps, FACTORS: factors})[:outputs]
    blocks = F.pad(x, (0, matrix.shape[1] - x.shape[1])).view(len(x), -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    unit = torch.where(largest.isinf(), torch.nan, largest / 127)
    rounded = torch.where(largest < LEAST, 0.0, torch.round(blocks / unit) * unit)
    return F.linear(rounded.flatten(1), matrix)


@integer_product.register_fake
def _product(x: Tensor, levels: Tensor, steps: Tensor, factors: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op(CACHED_ATTENTION, mutates_args=())
def cached_attention(query: Tensor, cache: Tensor, starts: Tensor, window: int, scale: float) -> Tensor:
    """Attention of one token of each of some sequences to itself and what came before.

    Args:
        query: (rows, heads, D) fp32.
        cache: (rows, 2 KV, room, D) fp32: keys and, behind them, values.
        starts: (rows) int64, the token's place.
        window: tokens that are attended to at most; 0: all.
        scale: of scores.

    Returns:
        (rows, heads, D) fp32.
    """
    keys, values = cache.chunk(2, 1)
    at, last = torch.arange(cache.shape[2], device=cache.device), starts[:, None]
    seen = at <= last
    if window:
        seen = seen & (at > last - window)
    return F.scaled_dot_product_attention(
        query[:, :, None], keys, values, seen[:, None, None], scale=scale, enable_gqa=True
    ).squeeze(2)


@cached_attention.register_fake
def _attention(query: Tensor, cache: Tensor, starts: Tensor, window: int, scale: float) -> Tensor:
    return query.new_empty(query.shape)
