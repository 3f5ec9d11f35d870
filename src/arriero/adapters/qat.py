"""Linear layers, with or without a low-rank adapter, that round weights and inputs while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.lora import LoRALinear
from arriero.errors import ConfigError
from arriero.models.products import is_plain_linear
from arriero.models.uncompiled import uncompiled
from arriero.quantization.fake_quant import greatest_input, input_scale, rounded_product, sum_of_weights, weight_scales
from arriero.quantization.linear import QuantizedLinear
from arriero.quantization.qat import QatSettings


@dataclass
class Rounding:
    """What all rounding layers of a model do at the moment.

    Attributes:
        on: whether they round.
        observing: whether they note the greatest magnitude of their inputs.
        real: (B or 1, S) bool, which tokens of the micro-batch they observe are no padding; None for all.
    """

    on: bool = True
    observing: bool = False
    real: Tensor | None = None


class RoundingLinear(nn.Module):
    """What a linear layer has in common with one that has an adapter, where both round.

    Attributes:
        input_range: (1,), the greatest magnitude that inputs are represented up to; None where they are not rounded.
        observed: the greatest magnitude of the inputs observed since it was last set, () fp32; None: nothing yet.
        group: the processes that hold the other columns of the weight; None if it is whole or cut by rows.
    """

    weight: Tensor
    bias: Any  # nn.Linear and LoRALinear call it by different types
    in_features: int
    out_features: int
    input_range: nn.Parameter | None
    settings: QatSettings
    rounding: Rounding
    observed: Tensor | None
    group: dist.ProcessGroup | None

    def start(self, settings: QatSettings, rounding: Rounding) -> None:
        """Begin to round; the range is 1 until it is set."""
        self.settings, self.rounding = settings, rounding
        self.observed = self.group = None
        self.input_range = None
        if settings.rounds_inputs:
            learned = settings.ranges == "learned"
            trained = [parameter.dtype for parameter in self.parameters() if parameter.requires_grad]
            dtype = trained[0] if learned and trained else torch.float32  # FSDP reduces gradients of one dtype
            ones = torch.ones(1, dtype=dtype, device=self.weight.device)
            self.input_range = nn.Parameter(ones, requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        if self.rounding.observing and self.input_range is not None:
            self.observe(x)
        if not self.rounding.on:
            return self.exact_product(x, bias)
        return rounded_product(
            x,
            self.weight,
            bias,
            self.settings.weights,
            input_range=self.input_range,
            adapter=self.adapter(),
            group=self.group,
        )

    @uncompiled
    def observe(self, x: Tensor) -> None:
        """Note the greatest magnitude of inputs (B, S, in)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        greatest = greatest_input(x, self.rounding.real)
        self.observed = greatest if self.observed is None else torch.maximum(self.observed, greatest)

    def adapter(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scaling of the update; None without."""
        return None

    def exact_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`product` without rounding."""
        return F.linear(x, self.weight, bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedLinear:
        """The layer that computes the same, bit for bit, from integers."""
        scheme = self.settings.stored
        a, b, scaling = self.adapter() or (None, None, 0.0)
        total = sum_of_weights(self.weight, a, b, scaling)
        tensors = scheme.store(total, weight_scales(total, scheme.integer))
        if self.input_range is not None:
            tensors["input_scale"] = input_scale(self.input_range)
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.weight.dtype)
        layer = QuantizedLinear.from_linear(plain, scheme)
        layer.assign(tensors)
        layer.bias = self.bias if self.bias is None else nn.Parameter(self.bias.detach(), requires_grad=False)
        return layer.train(self.training)


class PlainRoundingLinear(RoundingLinear, nn.Linear):
    """A linear layer that rounds."""


class AdaptedRoundingLinear(RoundingLinear, LoRALinear):
    """A linear layer with a low-rank update that rounds the sum of both."""

    def adapter(self) -> tuple[Tensor, Tensor, float] | None:
        return *self.factors(), self.scaling

    def exact_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return LoRALinear.product(self, x, bias)


def apply_qat(model: nn.Module, settings: QatSettings, *, column_parts: int = 1) -> list[str]:
    """Let every linear layer of the decoder round, in place; embedding and output head stay exact.

    Args:
        model: with its adapters, if it gets any.
        column_parts: processes that will share out the columns of the matrices that are cut so.

    Returns:
        The full names of the layers.

    Raises:
        ConfigError: if groups do not fit a layer, or an adapter is not one that can be added to the weight.
    """
    rounding, names = Rounding(), []
    for name, module in list(_linear_layers(model)):
        if not (is_plain_linear(module) or type(module) is LoRALinear) or getattr(module, "scheme", None) is not None:
            kind = type(module).__name__
            raise ConfigError(f"--qat cannot round {name} ({kind}): it needs exact weights, or plain LoRA beside them")
        cut = name.rpartition(".")[2] in ("o_proj", "down_proj")
        settings.check_layer(name, module.in_features, column_parts if cut else 1)
        rounds = AdaptedRoundingLinear if isinstance(module, LoRALinear) else PlainRoundingLinear
        layer = rounds.__new__(rounds)
        vars(layer).update(vars(module))  # all that the layer has; the old one is dropped
        layer.start(settings, rounding)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        names.append(name)
    return names


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | LoRALinear | QuantizedLinear]]:
    """Those of the decoder, an adapter's own left out."""
    kinds = (nn.Linear, LoRALinear, QuantizedLinear)
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and ".lora_" not in name and isinstance(module, kinds):
            yield name, module


def inputs_of_layers(model: nn.Module) -> set[int]:
    """How many inputs the layers have that `apply_qat` lets round."""
    return {module.in_features for _, module in _linear_layers(model)}


def rounding_layers(model: nn.Module) -> Iterator[tuple[str, RoundingLinear]]:
    """The layers that round, with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, RoundingLinear):
            yield name, module


def rounding_of(model: nn.Module) -> Rounding | None:
    """What all of them do at the moment; None where the model has none."""
    return next((layer.rounding for _, layer in rounding_layers(model)), None)


def to_quantized(model: nn.Module) -> list[str]:
    """Put layers of integers in the place of those that round, in place: the model's numbers stay the same, bit for bit.

    Returns:
        Their names.
    """
    names = []
    for name, layer in list(rounding_layers(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.quantized())
        names.append(name)
    return names
