"""Scales and integers for a weight: round to nearest with a search of the range, and GPTQ.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a weight one input at a time and lets the inputs that are not rounded yet
make up for the error, by the second moments of the layer's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.quantization.integers import IntegerScheme, absmax_scales, dequantize, quantize, storable

# Shares of the absmax scale that are tried. Eight bits lose more by clipping than they win, below that.
_SHARES = {4: [1.0 - 0.01 * step for step in range(51)], 8: [1.0 - 0.01 * step for step in range(11)]}
_BLOCK = 128  # inputs whose errors are carried over together; only speed depends on it
_UNDETERMINED = "the calibration data do not determine GPTQ's update: give a --data_file with more and other text"
_DAMPING = 0.01  # of the mean second moment, added to each (section 3.3)


def searched_scales(
    weight: Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """The scales whose rounded weights have the least squared error, each group for itself.

    Args:
        weight: (out, in) fp32.
        scale_dtype: in which scales are stored; what is compared is rounded with the stored ones.
        importance: (in,), how much an error in each input weighs; None: all alike.

    Returns:
        (out, groups) in `scale_dtype`.
    """
    full = absmax_scales(weight, scheme)
    factor = None if importance is None else importance.view(1, full.shape[1], -1)
    best, least = storable(full, scale_dtype), torch.full_like(full, torch.inf)
    for share in _SHARES[scheme.bits]:
        scales = storable(full * share, scale_dtype)
        error = (dequantize(quantize(weight, scales.float(), scheme), scales.float()) - weight).square_()
        error = error.view(*full.shape, -1)
        total = (error if factor is None else error.mul_(factor)).sum(-1)
        better = total < least
        best, least = torch.where(better, scales, best), torch.where(better, total, least)
    return best


def gptq(weight: Tensor, scales: Tensor, scheme: IntegerScheme, moments: Tensor, damping: float = _DAMPING) -> Tensor:
    """Integers that keep the layer's outputs, rather than its weights.

    Inputs are rounded in the order of falling second moments, with the scales of the groups that they are stored in. An input
    that is always zero keeps its nearest integer.

    Args:
        weight: (out, in), in the dtype of the computation.
        scales: (out, groups), none of them zero.
        moments: (in, in), the mean of ``x x^T`` over the tokens.

    Returns:
        (out, in) int8.

    Raises:
        ConfigError: if the moments cannot be inverted, or what is carried over grows beyond all numbers.
    """
    in_features = weight.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    rest = weight[:, order].clone()
    column_scales = scales.to(weight.dtype).repeat_interleave(in_features // scales.shape[1], dim=1)[:, order]
    factor = _inverse_factor(moments[order][:, order], damping)
    integers = torch.empty_like(rest)
    for start in range(0, in_features, _BLOCK):
        end = min(start + _BLOCK, in_features)
        block, triangle = rest[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(end - start):
            column, scale = block[:, at], column_scales[:, start + at]
            rounded = torch.clamp(torch.round(column / scale), scheme.low, scheme.high)
            integers[:, start + at] = rounded
            errors[:, at] = (column - rounded * scale) / triangle[at, at]
            block[:, at + 1 :] -= errors[:, at, None] * triangle[at, at + 1 :]
        rest[:, end:] -= errors @ factor[start:end, end:]
    if not torch.isfinite(integers).all():  # the cast would make numbers of them
        raise ConfigError(_UNDETERMINED)
    found = torch.empty_like(integers, dtype=torch.int8)
    found[:, order] = integers.to(torch.int8)
    return found


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments (section 3.3, step 3)."""
    diagonal = moments.diagonal()
    matrix = moments.clone()
    matrix.diagonal()[diagonal == 0] = diagonal.mean().clamp_min(1e-12)
    for attempt in range(4):  # moments of few tokens have hardly more than their rank
        added = damping * 10.0**attempt * diagonal.mean()
        damped = matrix + added * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(failed) == 0:
                return upper
    raise ConfigError(_UNDETERMINED)


def output_error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """The mean squared difference, a token, of two weights' outputs: trace of D M D^T, D = weight - other."""
    difference = weight - other
    return float((difference @ moments * difference).sum())
