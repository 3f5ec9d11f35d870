"""Noise on embeddings that is a function of integers, so that every process and every layout adds the same.

Numbers are drawn by counting, without a state: the finalizer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators") of a key and the number of the channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def scramble(x: Tensor) -> Tensor:
    """int64 -> int64, one to one, where neighbours have nothing in common any more; products wrap around."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, as if without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class EmbeddingNoise:
    """Uniform noise on the embeddings of a micro-batch (Jain et al. 2023, "NEFTune", arXiv:2310.05914, algorithm 1).

    Attributes:
        keys: (B, S) int64, what each token's noise is drawn from.
        lengths: (B, S) int64, of the row that each token is of; below 1 a token gets no noise.
        alpha: each number is drawn from +-alpha / sqrt(length x hidden size).
    """

    keys: Tensor
    lengths: Tensor
    alpha: float

    def added_to(self, hidden: Tensor) -> Tensor:
        """(B, S, hidden) -> the same with noise."""
        width = hidden.shape[-1]
        channels = torch.arange(1, width + 1, device=hidden.device) * GOLDEN
        drawn = _shifted(scramble(self.keys[..., None] + channels), 40).float()  # 24 bits, exact in fp32
        uniform = (drawn + 0.5) * 2.0**-23 - 1.0
        size = self.alpha / (self.lengths.clamp(min=1) * width).float().sqrt() * (self.lengths > 0)
        return hidden + (uniform * size[..., None]).to(hidden.dtype)

    def part(self, index: int, count: int) -> EmbeddingNoise:
        """That of one of so many equal runs of the tokens."""
        keys, lengths = (tensor.chunk(count, dim=1)[index] for tensor in (self.keys, self.lengths))
        return EmbeddingNoise(keys, lengths, self.alpha)
