"""Levels for blocks of weights: every weight of a block is `low + step * q`, q a whole number.

Formats of other worlds hold their weights like this (ggml's Q4_0, Q4_1 and Q4_K, and whatever GPTQ or AWQ rounded): such a
block is found again as it was, also in a file to which it was written in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Steps in a block's range that are tried where the most of them do not fit: beyond it, so that its ends are cut off, and fewer.
_BEYOND = (0.5, 1.0, 1.5, 2.0, 3.0)
# Of the largest weight of a block: what rounding to fp32 leaves of a difference.
_EXACT = 1e-6


def fit_levels(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The levels of the least squared error among those tried; exact ones where a block has no more levels than there are.

    Args:
        blocks: (..., size) fp32.

    Returns:
        Integers (..., size) uint8 from 0 to 2^bits - 1, and of each block (...) the step, which is above 0, and the low.
    """
    top = (1 << bits) - 1
    flat = blocks.reshape(-1, blocks.shape[-1])
    integers, step, low, error = _fitted(flat, top, top)
    bound = _bound(flat)
    left = (error > bound).nonzero().flatten()
    tried = [*[top + more for more in _BEYOND], *range(top - 1, 0, -1)]
    for steps in tried if len(left) else ():
        found = _fitted(flat[left], steps, top)
        better = found[3] < error[left]
        for kept, new in zip((integers, step, low, error), found, strict=True):
            kept[left[better]] = new[better]
        if steps < top:
            left = left[error[left] > bound[left]]
            if not len(left):
                break
    shape = blocks.shape[:-1]
    return integers.view(blocks.shape), step.view(shape), low.view(shape)


def _bound(blocks: Tensor) -> Tensor:
    """The squared error of a block that counts as none."""
    return (blocks.abs().amax(-1) * _EXACT).square_().mul_(blocks.shape[-1])


def _fitted(blocks: Tensor, steps: float, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The integers for so many steps in the range of each block (n, size), the line through them, and its squared error."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    start = (high - low) / steps
    flat = start <= high.abs().maximum(low.abs()) * _EXACT  # all its weights are alike
    start = torch.where(flat, torch.ones_like(start), start)
    levels = ((blocks - low) / start).round_().clamp_(0, top)
    # least squares: weights as a line over the integers, both less their means
    mean, middle = blocks.mean(-1, keepdim=True), levels.mean(-1, keepdim=True)
    apart = levels - middle
    step = (apart * (blocks - mean)).sum(-1, keepdim=True) / apart.square().sum(-1, keepdim=True).clamp_min_(1e-30)
    step = torch.where(flat | (step <= 0), start, step)
    low = torch.where(flat, low, mean - step * middle)
    error = (levels * step + low - blocks).square_().sum(-1)
    return levels.to(torch.uint8), step[..., 0], low[..., 0], error
