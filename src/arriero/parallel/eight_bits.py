"""Let the matrices of decoder layers be trained in 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from arriero.adapters.lora_linear import LoRALinear
from arriero.adapters.qat import RoundingLinear
from arriero.errors import ConfigError
from arriero.models.fp8_linear import UNIT, Fp8Linear, fits
from arriero.quantization.linear import has_quantized_layers


def apply_fp8(model: nn.Module) -> None:
    """Every matrix of the decoder layers whose sizes allow it, in place; parameters and their names do not change.

    Under tensor parallelism the sizes are those of this process's part, which also has scales of its own.

    Raises:
        ConfigError: for weights that are rounded to something else, and if no matrix has such sizes.
    """
    if has_quantized_layers(model):
        raise ConfigError("--fp8: the weights of this model are quantized: give the original model, or drop --fp8")
    layers = dict(_matrices(model))
    for layer in layers.values():
        if isinstance(layer, RoundingLinear):
            raise ConfigError("--fp8 and --qat do not go together: each rounds weights and inputs in its own way")
        if not fits(layer.in_features, layer.out_features):
            continue
        if isinstance(layer, LoRALinear):
            layer.fp8 = True
        else:
            layer.__class__ = Fp8Linear  # in place: tensor parallelism keeps hold of the layer itself
    if layers and not any(map(is_fp8, layers.values())):
        name, layer = next(iter(layers.items()))
        raise ConfigError(
            f"--fp8: no matrix of this model has inputs and outputs that are multiples of {UNIT} ({name} is "
            f"{layer.out_features} x {layer.in_features} in a process): drop it"
        )


def is_fp8(layer: nn.Module) -> bool:
    """Whether a layer is trained in 8 bits."""
    return isinstance(layer, Fp8Linear) or (isinstance(layer, LoRALinear) and layer.fp8)


def describe_fp8(model: nn.Module) -> str:
    """One line for the log: how many matrices are, and which are not."""
    layers = dict(_matrices(model))
    left = sorted({name.rpartition(".")[2] for name, layer in layers.items() if not is_fp8(layer)})
    count = sum(map(is_fp8, layers.values()))
    rest = f"; not {', '.join(left)}, whose sizes are no multiples of {UNIT}" if left else ""
    return f"fp8: the products of {count} matrices{rest}"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear | LoRALinear]]:
    """Those of the decoder layers, an adapter's own left out."""
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj") and isinstance(module, nn.Linear | LoRALinear):
            yield name, module
