"""A linear layer whose weight is stored in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arriero.errors import ConfigError, FormatError
from arriero.models.config import LlamaConfig
from arriero.models.products import Linear, linear, product
from arriero.models.weight_shapes import weight_shapes
from arriero.quantization.integers import at_least_fp32
from arriero.quantization.schemes import WeightScheme

# What a merge tells a user of a base with `rounds_inputs`.
INPUTS_NOT_ROUNDED = (
    "warning: the layers of the base round their inputs to 8 bits; the merged model does not, its numbers differ"
)


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` made of its stored form for each call.

    The stored tensors are frozen parameters, named as the scheme names them (`weight_packed`, `weight_scale`, ...). They keep
    their dtypes whatever the model is cast to. Nothing of the size of ``W`` outlives a call, in the backward pass neither.

    Args:
        bias: the layer's own, or None.
        dtype: of a weight that is not quantized: what `dequantized` gives unless asked otherwise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: WeightScheme,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.dtype = in_features, out_features, scheme, dtype
        for name, (shape, kind) in scheme.tensors(out_features, in_features).items():
            empty = torch.empty(shape, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, scheme: WeightScheme, tensors: Mapping[str, Tensor] | None = None
    ) -> QuantizedLinear:
        """The quantized form of a layer; on the meta device without values.

        Args:
            tensors: the stored form of its weight; None makes it by the scheme's plain rule. A stored scale of activations
                must be among them.
        """
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, scheme, linear.bias, "meta", weight.dtype)
        if not weight.is_meta:
            layer.assign(scheme.quantize(weight) if tensors is None else tensors)
        return layer.train(linear.training)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the stored tensors, without a copy."""
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def stored(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight, by name."""
        return stored_tensors(self, self.scheme)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out, in), in `dtype` (default: that of the model that was quantized)."""
        return self.scheme.dequantize(self.stored(), dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        return quantized_product(x, self.scheme, self.stored(), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        own = {id(tensor) for tensor in self.stored().values()}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype or id(tensor) not in own else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.scheme}"


def stored_tensors(module: nn.Module, scheme: WeightScheme) -> dict[str, Tensor]:
    """The tensors of a scheme that a module holds, by name: of a `QuantizedLinear`, or of a layer that took them over."""
    return {name: module.get_parameter(name) for name in scheme.tensor_names}


def quantized_product(x: Tensor, scheme: WeightScheme, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """``x W^T + b`` with the weight made of its stored form, and again for the backward pass.

    Where the scheme rounds activations, ``x`` is rounded first; its gradient passes straight through where ``x`` lies in the
    range (Bengio et al. 2013, arXiv:1308.3432). Both factors are integer times scale, in `x`'s dtype (or autocast's): the
    numbers of a model trained with rounding are met bit for bit.

    Args:
        x: (..., in).

    Returns:
        (..., out).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _QuantizedProduct.apply(x, bias, scheme, *stored.values())  # type: ignore[no-untyped-call]
    return y


class _QuantizedProduct(torch.autograd.Function):
    """Keeps the stored tensors for the backward pass, where F.linear would keep the whole weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, scheme: WeightScheme, *stored: Tensor) -> Tensor:
        tensors = dict(zip(scheme.tensor_names, stored, strict=True))
        inside = None
        if scheme.activation is not None:
            x, inside = rounded(x, tensors.get("input_scale"))
        weight = scheme.dequantize(tensors, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(*stored, *(() if inside is None else (inside,)))
        ctx.scheme, ctx.dtype = scheme, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        names = ctx.scheme.tensor_names
        saved = ctx.saved_tensors  # only once: recomputation gives them a single time
        tensors = dict(zip(names, saved[: len(names)], strict=True))
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad.device.type, enabled=False):
                grad_x = product(grad.to(ctx.dtype), ctx.scheme.dequantize(tensors, ctx.dtype))
            if len(saved) > len(names):
                grad_x = grad_x * saved[-1]
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return (grad_x, grad_bias, None, *[None for _ in names])


def rounded(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations rounded to 8-bit integers times a scale.

    Args:
        x: (..., in).
        scale: (1,), None for one of each token: its greatest magnitude / 127.5, as compressed-tensors computes it.

    Returns:
        The rounded activations, and where ``x`` was not clipped (None: nowhere).
    """
    wide = at_least_fp32(x)
    if scale is None:
        greatest = wide.abs().amax(-1, keepdim=True)
        scale = torch.where(greatest > 0, greatest / 127.5, torch.ones_like(greatest))
        return (torch.round(wide / scale).clamp(-128, 127) * scale).to(x.dtype), None
    scaled = torch.round(wide / scale)
    return (scaled.clamp(-128, 127) * scale).to(x.dtype), (scaled >= -128) & (scaled <= 127)


def quantize_weight(name: str, weight: Tensor, scheme: WeightScheme) -> dict[str, Tensor]:
    """The stored form of a weight by the scheme's plain rule.

    Raises:
        FormatError: it has values that are infinite or no numbers: integers would make numbers of them.
    """
    if not torch.isfinite(weight).all():
        raise FormatError(
            f"{name} has values that are infinite or no numbers: take an earlier checkpoint, or fetch the model again"
        )
    return scheme.quantize(weight)


@torch.no_grad()
def quantize_layers(
    model: nn.Module, choose: Callable[[str, nn.Linear], WeightScheme | None]
) -> dict[str, QuantizedLinear]:
    """Put quantized layers in the place of linear ones, in place; on the meta device without values.

    Args:
        choose: the scheme of a layer by its full name, None to leave it as it is.

    Returns:
        The new layers by name.
    """
    found = {}
    for name, module in list(model.named_modules()):
        scheme = choose(name, module) if isinstance(module, nn.Linear) else None
        if scheme is not None:
            found[name] = QuantizedLinear.from_linear(module, scheme)
            replace_layer(model, name, found[name])
    return found


@torch.no_grad()
def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Put linear layers with plain weights in the place of quantized ones, in place; the names of these.

    Args:
        dtype: of the plain weights; None: see `QuantizedLinear.dequantized`.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    for name, layer in found:
        linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantized(dtype), requires_grad=False)
        linear.bias = layer.bias  # type: ignore[assignment]  # typed as if there always were one
        replace_layer(model, name, linear.train(layer.training))
    return [name for name, _ in found]


def rounds_inputs(model: nn.Module) -> bool:
    """Whether any quantized layer of a model, under an adapter or not, rounds its inputs: plain weights alone do not."""
    schemes = (getattr(module, "scheme", None) for module in model.modules())
    return any(isinstance(scheme, WeightScheme) and scheme.activation is not None for scheme in schemes)


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer of a model is quantized, under an adapter or not."""
    return any(isinstance(getattr(module, "scheme", None), WeightScheme) for module in model.modules())


def refuse_quantized(model: nn.Module, what: str, way_out: str) -> None:
    """Raises ConfigError where weights are to be trained that are stored in few bits."""
    if has_quantized_layers(model):
        raise ConfigError(f"the weights of this model are quantized and cannot be trained by {what}: {way_out}")


def linear_layers(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Full names and (out, in) of the linear layers of a model that are quantized: all but the output head."""
    shapes = weight_shapes(config)
    names = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in names.items()}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make `layer` the submodule of that full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
