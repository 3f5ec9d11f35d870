"""The two orders of the rows of a query or key projection.

RoPE rotates pairs of a head's dimensions. Meta's checkpoints and llama.cpp's architecture "llama" pair neighbours (rows
0,1 / 2,3 / …); HF, PaddlePaddle's files and this package pair row i with row i + head_dim/2. The same model needs its rows in
another order, a head at a time; values and attention outputs are untouched.
"""

from __future__ import annotations

from torch import Tensor


def pairs_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows for RoPE on neighbouring pairs -> rows for RoPE on halves: (heads, head_dim/2, 2) to (heads, 2, head_dim/2).

    Args:
        weight: (heads * head_dim, ...), a matrix or a bias.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows for RoPE on halves -> rows for RoPE on neighbouring pairs; undoes `pairs_to_halves`.

    Args:
        weight: (heads * head_dim, ...), a matrix or a bias.
    """
    return pairs_view(weight, heads).reshape(weight.shape)


def pairs_view(weight: Tensor, heads: int) -> Tensor:
    """`halves_to_pairs` as a view, (heads, head_dim/2, 2, ...), of a contiguous weight."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2)
