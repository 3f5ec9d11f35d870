"""Matrix products of training and scoring on a CPU, by whichever of torch's two libraries is faster there: see `onednn`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.onednn import is_suited, limit_kept_kernels, onednn_is_faster, onednn_product

# Outputs whose gradient oneDNN computes at once where it is added to another: it copies the first factor, and has no place for
# its result but a new one.
ADDED_AT_ONCE = 4096

_active = False


class Linear(nn.Linear):
    """torch's own layer with `linear` for its product."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer and nothing more."""
    return type(module) in (nn.Linear, Linear)


@contextlib.contextmanager
def fast_products(*, one_shape: bool = False) -> Iterator[None]:
    """Inside, the functions of this module call oneDNN where it is faster. No effect on other processors.

    With its first use the compiled kernels that this process keeps are limited, where the environment has no other number.

    Args:
        one_shape: there is nothing to limit.
    """
    global _active
    if not onednn_is_faster():
        yield
        return
    if not one_shape:
        limit_kept_kernels()
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., in), (out, in), (out,) -> (..., out)."""
    if _active and is_suited(x.numel() // weight.shape[1], x, weight) and not torch.is_autocast_enabled("cpu"):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of (..., k) and (k, n), without gradients of its own: for what is a gradient, or asks for none."""
    if _active and is_suited(a.numel() // len(b), a, b):
        y: Tensor = _onednn(a, b.t(), None)
        return y
    return a @ b


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor, *, first: bool) -> None:
    """``total += grad^T x`` of (out, in), (rows, out) and (rows, in), without gradients of its own.

    Args:
        first: what `total` holds is not read.
    """
    by_onednn = _active and is_suited(grad.shape[1], grad, x)
    if total.dtype == grad.dtype and not by_onednn:
        total.addmm_(grad.t(), x, beta=0.0 if first else 1.0)  # beta 0: not even read
        return
    run = ADDED_AT_ONCE if by_onednn else len(total)
    for into, part in zip(torch.split(total, run), torch.split(grad, run, 1), strict=True):
        found = _onednn_gradient(part, x, into) if by_onednn else part.t() @ x
        if first:
            into.copy_(found)
        else:
            into += found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _onednn(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight) if ctx.needs_input_grad[0] else None,
            _weight_gradient(rows, x.flatten(0, -2), weight) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


@torch.library.custom_op("arriero::onednn_product", mutates_args=())
def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``; an operator of its own, which the compiler leaves as it is.

    oneDNN reads a weight in rows or in columns without gaps; of any other it computes number by number, 2,000 times as slowly.
    """
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return onednn_product(x, weight, bias)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``grad^T x`` of (rows, out) and (rows, in), in the shape of the weight."""
    if _active and is_suited(weight.shape[0], grad, x):
        found: Tensor = _onednn_gradient(grad, x, weight)
        return found
    return grad.t() @ x


@torch.library.custom_op("arriero::onednn_weight_gradient", mutates_args=())
def _onednn_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same by oneDNN's own product for it, which reads the columns of its first factor where they lie."""
    found: Tensor
    found, _ = torch.ops.aten.mkldnn_linear_backward_weights.default(grad.to_mkldnn(), x.to_mkldnn(), weight, False)
    return found


@_onednn_gradient.register_fake
def _gradient_shape(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


@_onednn.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def prefers_onednn() -> bool:
    """Whether `fast_products` is in force, and has an effect here."""
    return _active
