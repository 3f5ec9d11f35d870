"""Low-rank adaptation of one linear layer (Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1).

A target layer computes ``y = x W^T + b + scaling * dropout(x) A^T B^T`` with ``A`` of shape (rank, in) and ``B`` of shape
(out, rank). The base weight keeps its name (``...q_proj.weight``): a checkpoint of the base loads into an adapted model
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.part_dropout import part_dropout
from arriero.models.fp8_linear import forward_product, fp8_product, input_gradient, scaled_gradient
from arriero.models.products import linear, product
from arriero.quantization.linear import QuantizedLinear, quantized_product, stored_tensors
from arriero.quantization.schemes import WeightScheme


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update beside it; the base layer's own parameters keep their names.

    Attributes:
        weight: the base's, (out, in); one of the stored tensors of a quantized base may have this name too.
        scheme: how a quantized base is stored; None for a plain one.
        plus_scale: learning rate of B divided by that of A.
        input_part: which part of the layer's inputs this process has, and of how many.
        fp8: whether, in training, the base's weight is multiplied in 8-bit floats; the update's matrices never are.
    """

    weight: Tensor
    bias: Tensor | None
    scheme: WeightScheme | None

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        if isinstance(base, QuantizedLinear):
            self.scheme, self.base_dtype = base.scheme, base.dtype
            stored = base.stored()
            for name, tensor in stored.items():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            device = next(iter(stored.values())).device
        else:
            self.scheme, self.base_dtype = None, base.weight.dtype
            self.weight, device = base.weight, base.weight.device
        self.bias = base.bias
        self.fp8 = False
        self.input_part = (0, 1)
        self.scaling, self.dropout, self.plus_scale = config.scaling, config.dropout, config.plus_scale
        # fp32 whatever the base's dtype: the update is small and its rounding would be lost in half precision
        dtype = torch.float32 if self.base_dtype in (torch.float16, torch.bfloat16) else self.base_dtype
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        if self.training and self.dropout > 0.0:
            y = self.base_product(x, bias)
            return y + self.update(self.dropped(x)).to(y.dtype)
        return self.adapted_product(x, bias)

    def dropped(self, x: Tensor) -> Tensor:
        """The input with dropout."""
        return part_dropout(x, self.dropout, self.input_part)

    def adapted_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x (W + delta)^T + bias``: `product` without dropout."""
        if self.scheme is not None:
            y = self.base_product(x, bias)
            return y + self.update(x).to(y.dtype)
        a, b = self.factors()
        flat: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self.weight, bias, a, b, self.scaling, self.fp8 and self.training
        )
        return flat.view(*x.shape[:-1], self.out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (rank, in), and B, (out, rank), of the update as it is computed."""
        return self.lora_A.weight, self.lora_B.weight

    def update(self, x: Tensor) -> Tensor:
        """``x delta^T``, (..., in) -> (..., out)."""
        a, b = self.factors()
        return F.linear(F.linear(x.to(a.dtype), a), b) * self.scaling

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without its update."""
        if self.fp8 and self.training:
            return fp8_product(x, self.weight, bias)
        if self.scheme is None:
            return linear(x, self.weight, bias)
        return quantized_product(x, self.scheme, stored_tensors(self, self.scheme), bias)

    def base_weight(self) -> Tensor:
        """The base weight, (out, in), in the adapter's dtype, at least fp32; not a copy where it is stored so."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        if self.scheme is None:
            return self.weight.to(dtype)
        return self.scheme.dequantize(stored_tensors(self, self.scheme), dtype)

    def delta(self) -> Tensor:
        """The update to the base weight, (out, in), in the adapter's dtype, at least fp32; differentiable."""
        a, b = self.factors()
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)) * self.scaling

    @torch.no_grad()
    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in), fp32, whose product is what `merged` has of the update."""
        a, b = self.factors()
        return b.float() * self.scaling, a.detach().float()

    def merged(self) -> Tensor:
        """The weight, (out, in), of the plain layer that computes the same, in the adapter's dtype, at least fp32."""
        return self.base_weight() + self.delta()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What is stored in few bits keeps its dtypes, as in `QuantizedLinear`."""
        own = set() if self.scheme is None else {id(t) for t in stored_tensors(self, self.scheme).values()}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if id(tensor) not in own or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, scaling={self.scaling}"


class _AdaptedLinear(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T`` that adds the update in place of a copy and skips the frozen weight's gradient.

    Written out, autograd would make two more (tokens, out) tensors forward and two more (tokens, in) ones backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, fp8):  # type: ignore[no-untyped-def]
        low = x.to(lora_a.dtype) @ lora_a.t()
        kept = [x, weight, lora_a, lora_b, low]
        if fp8:
            y, _, scale = forward_product(x, weight)
            kept.append(scale)  # of the weight
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = linear(x, weight, bias)
        y.addmm_(low.to(y.dtype), lora_b.t().to(y.dtype), alpha=scaling)
        ctx.save_for_backward(*kept)
        ctx.scaling, ctx.has_bias = scaling, bias is not None
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        # every product names its dtype; a pipeline's schedule may run the backward pass inside autocast
        with torch.autocast(grad.device.type, enabled=False):
            return (*_adapted_gradients(ctx, grad), None, None)  # type: ignore[no-untyped-call]


def _adapted_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, low, *scale = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    wide = grad.to(lora_b.dtype)
    grad_low = (wide @ lora_b).mul_(ctx.scaling)
    grad_b = (wide.t() @ low.to(wide.dtype)).mul_(ctx.scaling)
    grad_a = grad_low.t() @ x.to(lora_a.dtype)
    grad_x = None
    if needs_x:
        if scale:
            grad_x = input_gradient(scaled_gradient(grad), weight, scale[0], len(grad), grad.dtype)
        else:
            grad_x = product(grad, weight.to(grad.dtype))
        grad_x.addmm_(grad_low.to(grad.dtype), lora_a.to(grad.dtype))
        grad_x = grad_x.to(x.dtype)
    grad_weight = product(grad.t(), x.to(grad.dtype)).to(weight.dtype) if needs_weight else None
    grad_bias = grad.sum(0) if ctx.has_bias and needs_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b
