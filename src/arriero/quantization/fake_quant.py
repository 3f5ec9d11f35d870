"""A linear layer that computes with rounded weights and inputs while it trains the exact ones.

The gradient of rounding is taken as 1: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432). Weights never
leave the range of their scales, which are those of their own greatest magnitudes. Inputs beyond theirs are clipped: no
gradient passes there, and the range itself learns from them (Choi et al. 2018, "PACT", arXiv:1805.06085, section 3.1, with
a range on both sides of zero).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.models.products import linear, product
from arriero.models.uncompiled import uncompiled
from arriero.quantization.integers import IntegerScheme, absmax_scales, at_least_fp32, dequantize, quantize
from arriero.quantization.linear import rounded

INPUT_HIGH = 127  # inputs are rounded to 8 bits
INPUT_LOW = -128
LEAST_RANGE = 1e-8  # what an optimizer made of it, a range stays above zero


def input_scale(input_range: Tensor) -> Tensor:
    """The scale of inputs, (1,) fp32 at least, of a range (1,): what is stored beside the integers of a converted layer."""
    return at_least_fp32(input_range.detach()).clamp_min(LEAST_RANGE) / INPUT_HIGH


def weight_scales(weight: Tensor, scheme: IntegerScheme, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scales of a weight's greatest magnitudes.

    Args:
        weight: (out, in), or this process's columns of it.
        group: the processes that hold the other columns. Groups of columns are whole in one process.

    Returns:
        (out, groups), bit for bit those of the whole weight.
    """
    if group is not None and scheme.group_size is None:
        weight = _greatest(weight.abs().amax(-1, keepdim=True), group)
    return absmax_scales(weight, scheme)


@uncompiled
def _greatest(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def rounded_weight(weight: Tensor, scales: Tensor, scheme: IntegerScheme) -> Tensor:
    """The nearest multiples of the scales: (out, in) fp32 -> (out, in) fp32."""
    return dequantize(quantize(weight, scales, scheme), scales)


def sum_of_weights(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """``W + s B A`` in fp32 at least, (out, in): the weight that an adapted layer rounds; without an adapter ``W``."""
    if lora_a is None or lora_b is None:
        return at_least_fp32(weight)
    with torch.autocast(weight.device.type, enabled=False):
        return at_least_fp32(weight) + (at_least_fp32(lora_b) @ at_least_fp32(lora_a)) * scaling


def rounded_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: IntegerScheme,
    *,
    input_range: Tensor | None = None,
    adapter: tuple[Tensor, Tensor, float] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``round(x) round(W + s B A)^T + b``, with gradients of all of them.

    Both factors are formed in fp32 and rounded once to `x`'s dtype (or autocast's), as
    `arriero.quantization.linear.QuantizedLinear` does: the numbers of a converted layer are the same bit for bit. Of the
    size of the weight nothing is kept for the backward pass, which rounds again.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        input_range: (1,), the greatest magnitude that inputs are represented up to; None leaves them as they are.
        adapter: A (rank, in), B (out, rank) and s.
        group: see `weight_scales`.

    Returns:
        (..., out).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    lora_a, lora_b, scaling = adapter or (None, None, 0.0)
    with torch.no_grad():  # outside of the function: messages are not sent again in the backward pass
        total = sum_of_weights(weight, lora_a, lora_b, scaling)
        scales = weight_scales(total, scheme, group)
    y: Tensor = _RoundedProduct.apply(  # type: ignore[no-untyped-call]
        x, input_range, weight, lora_a, lora_b, bias, total, scales, scheme, scaling
    )
    return y


class _RoundedProduct(torch.autograd.Function):
    """Keeps what F.linear keeps: the inputs and the parameters as they are."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        input_range: Tensor | None,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        total: Tensor,
        scales: Tensor,
        scheme: IntegerScheme,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x, input_range, weight, lora_a, lora_b, bias, scales)
        ctx.scheme, ctx.scaling = scheme, scaling
        if input_range is not None:
            x, _ = rounded(x, input_scale(input_range))
        with torch.autocast(x.device.type, enabled=False):
            factor = rounded_weight(total, scales, scheme).to(x.dtype)
            return linear(x, factor, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # every product names its dtype; a pipeline's schedule may run the backward pass inside autocast
        with torch.autocast(gradients[0].device.type, enabled=False):
            return (*_gradients(ctx, gradients[0]), None, None, None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, input_range, weight, lora_a, lora_b, bias, scales = ctx.saved_tensors
    needs_x, needs_range, needs_weight, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:6]
    grad, inside, values = grad.to(x.dtype), None, x
    if input_range is not None:
        values, inside = rounded(x, input_scale(input_range))
    grad_x = grad_range = grad_weight = grad_a = grad_b = grad_bias = None
    if needs_x or needs_range:
        total = rounded_weight(sum_of_weights(weight, lora_a, lora_b, ctx.scaling), scales, ctx.scheme)
        grad_x = product(grad, total.to(x.dtype))
        del total
        if inside is not None:
            if needs_range:
                grad_range = _range_gradient(x, grad_x, inside).to(input_range.dtype)
            grad_x = grad_x * inside
    tokens, values = grad.flatten(0, -2), values.flatten(0, -2)
    if needs_weight:
        grad_weight = product(tokens.t(), values).to(weight.dtype)
    if needs_a or needs_b:
        wide, values = tokens.to(lora_a.dtype), values.to(lora_a.dtype)
        grad_b = (wide.t() @ (values @ lora_a.t())).mul_(ctx.scaling)
        grad_a = ((wide @ lora_b).t() @ values).mul_(ctx.scaling)
    if needs_bias:
        grad_bias = tokens.sum(0).to(bias.dtype)
    return grad_x if needs_x else None, grad_range, grad_weight, grad_a, grad_b, grad_bias


def _range_gradient(x: Tensor, grad: Tensor, inside: Tensor) -> Tensor:
    """What clipping passes to the range, (1,), fp32 at least: a clipped input stands at the range, or at -128/127 of it."""
    wide = at_least_fp32(grad)
    below = wide * (INPUT_LOW / INPUT_HIGH)
    return torch.where(x > 0, wide, below).masked_fill(inside, 0.0).sum().reshape(1)


def greatest_input(x: Tensor, real: Tensor | None) -> Tensor:
    """The greatest magnitude among the inputs of real tokens, () fp32.

    Args:
        x: (B, S, in).
        real: (B or 1, S) bool, None for all.
    """
    magnitudes = x.detach().abs().amax(-1)
    if real is not None:
        magnitudes = magnitudes.masked_fill(~real, 0.0)
    return at_least_fp32(magnitudes.max())
