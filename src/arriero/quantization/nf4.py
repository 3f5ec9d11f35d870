"""NormalFloat of 4 bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3), with the bytes of bitsandbytes.

Each block of inputs is divided by its greatest magnitude, and each number becomes the nearest of 16 levels: quantiles of
the normal distribution, brought to [-1, 1], with an exact zero (appendix E). Two levels fill a byte, the first one its
upper half.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The levels of a weight.

    Args:
        weight: (out, in) fp32.

    Returns:
        (out, in / 2) uint8, two levels a byte; (out, in / block_size) fp32, the greatest magnitude of each block.
    """
    blocks = weight.view(weight.shape[0], -1, block_size)
    absmax = blocks.abs().amax(-1)
    scaled = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))[..., None] * blocks
    levels = torch.tensor(LEVELS, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    indices = torch.bucketize(scaled, middles).to(torch.uint8).view(weight.shape)
    return (indices[:, 0::2] << 4) | indices[:, 1::2], absmax


def dequantize(packed: Tensor, absmax: Tensor) -> Tensor:
    """The inverse of `quantize`: (out, in) fp32."""
    levels = torch.tensor(LEVELS, device=packed.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): of each byte
    weight = pairs[packed.int()].view(*absmax.shape, -1)
    return weight.mul_(absmax[..., None]).view(packed.shape[0], -1)
