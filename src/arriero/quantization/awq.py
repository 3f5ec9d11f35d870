"""Activation-aware scaling before rounding (Lin et al. 2023, "AWQ", arXiv:2306.00978, section 3.2).

The columns of a weight that meet large inputs are made larger, and these inputs smaller by as much, so that rounding hurts
them less. The factor on the inputs is folded into what makes them, the norm or the linear layer before: the model stays a
plain one and computes the same until it is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arriero.models.llama import RMSNorm
from arriero.quantization.integers import IntegerScheme, absmax_scales, dequantize, quantize
from arriero.quantization.rounding import output_error

_STEPS = 20  # strengths tried: 0, 1/20, ... 19/20


@dataclass(frozen=True)
class Repeats:
    """How the outputs of the layer before become inputs, where one serves several: a value head, its queries' heads.

    Attributes:
        times: inputs that each output serves.
        size: outputs that are repeated as one, the head's.
    """

    times: int = 1
    size: int = 1

    def spread(self, outputs: Tensor) -> Tensor:
        """(outputs,) -> (inputs,)."""
        return outputs.view(-1, 1, self.size).expand(-1, self.times, -1).reshape(-1)

    def gathered(self, inputs: Tensor) -> Tensor:
        """(inputs,) -> (outputs,), the mean over those that an output serves."""
        return inputs.view(-1, self.times, self.size).mean(1).view(-1)


def best_factors(
    weights: Sequence[Tensor], scheme: IntegerScheme, magnitude: Tensor, moments: Tensor, repeats: Repeats
) -> Tensor:
    """Factors on what makes the inputs of several weights: ``magnitude ** strength``, with the best strength.

    Args:
        weights: (out, in) each.
        magnitude: (in,), the mean magnitude of each input.
        moments: (in, in), the mean of ``x x^T``.

    Returns:
        (outputs of the layer before,).
    """
    common = repeats.gathered(magnitude).clamp_min(1e-4)
    best, least = torch.ones_like(common), float("inf")
    for step in range(_STEPS):
        factors = common ** (step / _STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        columns = repeats.spread(factors)
        error = 0.0
        for weight in weights:
            scaled = weight * columns
            scales = absmax_scales(scaled, scheme)
            error += output_error(weight, dequantize(quantize(scaled, scales, scheme), scales) / columns, moments)
        if error < least:
            best, least = factors, error
    return best


@torch.no_grad()
def fold(
    previous: nn.Module, layers: Sequence[nn.Linear], factors: Tensor, repeats: Repeats, dtype: torch.dtype
) -> Tensor:
    """Divide what makes the inputs by the factors and multiply the columns that meet them, in place.

    Args:
        previous: the norm or linear layer before.
        factors: (outputs of `previous`,).
        dtype: in which a norm's weight will be stored: the columns are multiplied by what its rounding leaves.

    Returns:
        The factors on the columns, (in,).
    """
    assert isinstance(previous, RMSNorm | nn.Linear)
    if isinstance(previous, RMSNorm):
        before = previous.weight.clone()
        previous.weight.copy_((before / factors).to(dtype))
        factors = torch.where(previous.weight != 0, before / previous.weight, torch.ones_like(factors))
    else:
        previous.weight.div_(factors[:, None])
        if previous.bias is not None:
            previous.bias.div_(factors)
    columns = repeats.spread(factors)
    for layer in layers:
        layer.weight.mul_(columns)
    return columns
