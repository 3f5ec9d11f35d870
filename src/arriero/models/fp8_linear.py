"""Linear layers that are trained with products of 8-bit floats.

``y = x W^T``, ``dx = dy W`` and ``dW = dy^T x`` take inputs and weights as e4m3 and gradients as e5m2 (Micikevicius et al.
2022, "FP8 formats for deep learning", arXiv:2209.05433) and add up in fp32. Each tensor has one scale, which makes its greatest
magnitude the format's greatest number; it is found anew at every use. That is the recipe "tensorwise" of torchao's float8
(https://github.com/pytorch/ao/tree/main/torchao/float8). Parameters and what stands between the products keep their types.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.errors import ConfigError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
UNIT = 16  # the matrix units want sizes that are multiples of it
LEAST = 1e-12  # smaller magnitudes get no larger scale; zeros stay zeros
CAPABILITY = (8, 9)  # of NVIDIA's Ada; Hopper's is (9, 0)


class Scaled(NamedTuple):
    """A matrix in 8 bits: `values` (rows, columns), row after row in memory, times `factor` (1,) fp32."""

    values: Tensor
    factor: Tensor


def check_device(device: torch.device) -> None:
    """Raises ConfigError where products of 8-bit floats cannot be computed."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or found < CAPABILITY:
            raise ConfigError(
                f"--fp8 needs an H100, an RTX 40 or a newer NVIDIA GPU (compute capability 8.9): "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; drop it"
            )
        return
    try:
        ones = scaled(torch.ones(UNIT, UNIT, device=device), E4M3)
        _product(ones.values, ones.factor, ones.values.t(), ones.factor, torch.bfloat16, fast=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"--fp8: torch {torch.__version__} has no 8-bit products on this {device}; drop it"
        ) from error


def fits(in_features: int, out_features: int) -> bool:
    """Whether a weight of this size can be multiplied in 8 bits."""
    return in_features % UNIT == 0 and out_features % UNIT == 0


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """A matrix (rows, columns) in 8 bits. One number that is not finite makes all of them NaN.

    The scale is a quotient of doubles, so that compiled code has the same one (torchao's `amax_to_scale`).
    """
    scale = _scale(x, dtype)
    return Scaled(_rounded(x, scale, dtype), scale.reciprocal())


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    greatest = x.detach().abs().amax().double().clamp(min=LEAST)
    return (torch.finfo(dtype).max / greatest).float().reshape(1)


def _rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # A scale with a dimension widens the product to fp32. It is the format's greatest number at most but for fp32's
    # rounding, from where it rounds down to it: nothing needs to be clipped.
    return (x * scale).to(dtype).contiguous()


def _product(a: Tensor, a_factor: Tensor, b: Tensor, b_factor: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """(m, k) by rows times (k, n) by columns, which is the only layout that Hopper's units take.

    Args:
        fast: add up in the units' own registers, of fewer bits, as torchao does in forward passes.
    """
    with torch.autocast(a.device.type, enabled=False):  # it would reach into what a CPU makes of this product
        y: Tensor = torch._scaled_mm(a, b, scale_a=a_factor, scale_b=b_factor, out_dtype=dtype, use_fast_accum=fast)
    return y


def _filled(x: Tensor) -> Tensor:
    """(T, n) with rows of zeros behind, so that T is a multiple of `UNIT`: the weight's gradient adds up over T."""
    missing = -x.shape[0] % UNIT
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _first(y: Tensor, rows: int) -> Tensor:
    return y if y.shape[0] == rows else y[:rows]


def output_dtype(x: Tensor) -> torch.dtype:
    """The type of a product with `x`: autocast's, or `x`'s own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def forward_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Scaled, Tensor]:
    """``x W^T``, without gradients.

    Args:
        x: (T, in).
        weight: (out, in).

    Returns:
        (T, out); ``x`` as it was multiplied, with rows of zeros behind; the weight's scale, for `input_gradient`.
    """
    inputs, scale = scaled(_filled(x), E4M3), _scale(weight, E4M3)
    columns = _rounded(weight, scale, E4M3).t()
    y = _product(inputs.values, inputs.factor, columns, scale.reciprocal(), output_dtype(x), fast=True)
    return _first(y, x.shape[0]), inputs, scale


def input_gradient(grad: Scaled, weight: Tensor, scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``dy W``, (rows, in) of `dtype`.

    Args:
        grad: of ``dy`` (rows or more, out).
        weight: (out, in), which is rounded again: held since the forward pass it would take a byte a parameter.
    """
    columns = _rounded(weight, scale, E4M3).t().contiguous().t()
    return _first(_product(grad.values, grad.factor, columns, scale.reciprocal(), dtype, fast=False), rows)


def weight_gradient(grad: Scaled, inputs: Scaled, dtype: torch.dtype) -> Tensor:
    """``dy^T x``, (out, in) of `dtype`, of as many rows of both."""
    rows, columns = grad.values.t().contiguous(), inputs.values.t().contiguous().t()
    return _product(rows, grad.factor, columns, inputs.factor, dtype, fast=False)


def scaled_gradient(grad: Tensor) -> Scaled:
    """A gradient (T, out) as the backward products take it, with rows of zeros behind."""
    return scaled(_filled(grad), E5M2)


class _Fp8Product(torch.autograd.Function):
    """Keeps the inputs in 8 bits, and none where the weight is not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, inputs, scale = forward_product(x, weight)
        kept = (inputs.values, inputs.factor) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(weight, scale, *kept)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = gradients
        weight, scale, *kept = ctx.saved_tensors
        rounded = scaled_gradient(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(rounded, weight, scale, grad.shape[0], grad.dtype).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(rounded, Scaled(*kept), weight.dtype)
        return grad_x, grad_weight


def fp8_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` with all three products in 8 bits.

    Args:
        x: (..., in).
        weight: (out, in), of any float type; both sizes `fits`.
        bias: (out,), added in the product's type.

    Returns:
        (..., out), of autocast's type or else of `x`'s.
    """
    flat: Tensor = _Fp8Product.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    y = flat.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


class Fp8Linear(nn.Linear):
    """A linear layer that computes in 8 bits while it trains, and in the weight's own type else: that is what is saved."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        return fp8_product(x, self.weight, bias) if self.training else F.linear(x, self.weight, bias)
