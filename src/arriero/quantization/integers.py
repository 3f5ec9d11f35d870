"""Symmetric integer quantization of weights: one scale for each output channel, or for each group of its inputs.

``q = clamp(round(w / scale), low, high)`` and ``w' = q * scale``, rounding half to even. Training with rounded weights,
rounding after training and the stored checkpoint all use these functions, so that they agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from arriero.errors import ConfigError


@dataclass(frozen=True)
class IntegerScheme:
    """How the weights of a linear layer become integers.

    Attributes:
        bits: 8 or 4.
        group_size: consecutive inputs of an output channel that share a scale; None for the whole channel.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights of {self.bits} bits are not supported: 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"--group_size is {self.group_size}: give at least 1, or -1 for a whole output channel")

    @property
    def low(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest integer."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Scales of each output channel.

        Raises:
            ConfigError: if the inputs do not divide into groups.
        """
        size = self.group_size or in_features
        if in_features % size:
            raise ConfigError(
                f"--group_size {size} does not divide the {in_features} inputs of a layer: give one that does, such as "
                f"{gcd(in_features, 128)}"
            )
        return in_features // size


def at_least_fp32(x: Tensor) -> Tensor:
    """Rounding is decided in fp32, and in fp64 where that is what a model computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored: rounded to `dtype`, and never zero, where a weight divided by one would be no number.

    What `dtype` has no number for becomes its smallest one; of types with the exponents of fp32 that is the smallest normal
    one, since some processors take those below for zero.
    """
    kind = torch.finfo(dtype)
    smallest = max(kind.smallest_normal * kind.eps, torch.finfo(torch.float32).smallest_normal)
    return scales.to(dtype).clamp_min(smallest)


def absmax_scales(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    """Scales that bring the greatest magnitude of each group to `scheme.high`.

    Args:
        weight: (out, in).

    Returns:
        (out, groups) in the weight's dtype; 1 where a group is all zeros.
    """
    grouped = weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    greatest = grouped.abs().amax(-1)
    return torch.where(greatest > 0, storable(greatest / scheme.high, weight.dtype), torch.ones_like(greatest))


def quantize(weight: Tensor, scales: Tensor, scheme: IntegerScheme) -> Tensor:
    """(out, in) -> (out, in) int8, each in [low, high]."""
    grouped = weight.reshape(weight.shape[0], scales.shape[1], -1)
    return torch.clamp(torch.round(grouped / scales[..., None]), scheme.low, scheme.high).to(torch.int8).view_as(weight)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """(out, in) int8 and (out, groups) -> (out, in) in the scales' dtype."""
    grouped = integers.reshape(integers.shape[0], scales.shape[1], -1)
    return (grouped.to(scales.dtype) * scales[..., None]).view(integers.shape)
