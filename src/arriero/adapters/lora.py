"""Low-rank adapters on a model (Hu et al. 2021, "LoRA", arXiv:2106.09685): put on, stored, merged.

``A`` starts as Kaiming-uniform noise and ``B`` as zeros, so that training starts from the base model exactly; see
`arriero.adapters.dora` and `arriero.adapters.pissa` for the variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from arriero.adapters.dora import DoRALinear
from arriero.adapters.fresh import FreshAdapter, initial_values
from arriero.adapters.lora_config import DEFAULT_TARGETS, LoRAConfig
from arriero.adapters.lora_linear import LoRALinear
from arriero.adapters.pissa import PiSSALinear
from arriero.errors import ConfigError, FormatError
from arriero.formats.peft import BASE_COPIES
from arriero.formats.quantized import plain
from arriero.models.llama import LlamaForCausalLM
from arriero.models.products import Linear
from arriero.quantization.linear import QuantizedLinear, dequantize_layers, has_quantized_layers, replace_layer

__all__ = [
    "DEFAULT_TARGETS",
    "LoRAConfig",
    "LoRALinear",
    "adapted_layers",
    "adapter_state",
    "apply_lora",
    "check_adapter",
    "initial_values",
    "load_adapter_state",
    "merge_lora",
]
_NAMED = 3  # tensors named in a message; the others are counted


@torch.no_grad()
def apply_lora(model: nn.Module, config: LoRAConfig, seed: int = 0, *, fresh: bool = True) -> list[str]:
    """Freeze the model and put an adapter on each target layer, in place.

    Args:
        seed: of the adapter's fresh values, which are the same in any layout of processes.
        fresh: whether the adapters get first values; on the meta device they have none.

    Returns:
        The full names of the adapted layers.

    Raises:
        ConfigError: if no layer matches the targets, or of a fresh adapter one of them; or a rank is larger than a layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [name for name, module in model.named_modules() if config.targets(name, module)]
    _check_targets(model, config, names, each=fresh)
    kind = DoRALinear if config.use_dora else PiSSALinear if config.pissa else LoRALinear
    for name in names:
        base, own = model.get_submodule(name), config.of_layer(name)
        if own.rank > base.in_features + base.out_features:  # type: ignore[operator]  # else a file says what is allocated
            raise ConfigError(f"rank {own.rank} is more than {name} can use, {base.out_features} x {base.in_features}")
        replace_layer(model, name, kind(base, own).train(base.training))  # type: ignore[arg-type]
    if fresh:
        values = FreshAdapter(config, seed, lambda layer: model.get_submodule(layer).base_weight())  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            if ".lora_" in name and not parameter.is_meta:
                box = tuple(slice(0, size) for size in parameter.shape)
                parameter.copy_(values(name, box, tuple(parameter.shape)))
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias") and (
            config.bias == "all" or (config.bias == "lora_only" and isinstance(owner, LoRALinear))
        ):
            parameter.requires_grad_(True)
    return names


def _check_targets(model: nn.Module, config: LoRAConfig, names: list[str], *, each: bool) -> None:
    """
    Args:
        names: of the layers that match.
        each: whether every target has to match one; in files of others some may be for other models.
    """
    targets = config.target_modules
    if isinstance(targets, str):
        missed = [] if names else [targets]
    else:
        missed = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if names and not (each and missed):
        return
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear))
    known = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    raise ConfigError(
        f"lora_target_modules: no linear layer of this model matches {' or '.join(map(str, missed)) or 'an empty list'}; "
        f"they are called {', '.join(known)}"
    )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under their names in the model: those of every adapted layer, and the biases that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad}


def check_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare adapter tensors, named as in `adapter_state`, with those of an adapted model (on the meta device too).

    Raises:
        FormatError: naming the first tensors that are missing, unknown or of another shape, and how many more there are; or a
            copy of a weight of the base that is another one, or cannot be compared for the model has no values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wrong = [
        f"{name} is {tuple(tensor.shape)}, the model needs {own[name]}"
        if name in own
        else f"{name} is not in this model"
        for name, tensor in state.items()
        if own.get(name) != tuple(tensor.shape)
    ]
    wrong += [f"{name} is missing" for name in sorted(own) if ".lora_" in name and name not in state]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise FormatError(
            f"the adapter does not fit the model: {'; '.join(wrong[:_NAMED])}{more}: is it for another base model?"
        )
    for name in BASE_COPIES & state.keys():
        _check_copy(name, parameters[name], state[name])


def _check_copy(name: str, base: Tensor, copy: Tensor) -> None:
    """Raises FormatError unless an adapter's copy of a weight of the base is that weight, either one perhaps rounded."""
    if base.is_meta:
        raise FormatError(
            f"the adapter holds a copy of the base's {name}, which cannot be compared here: save it without "
            "(PEFT: save_embedding_layers=False)"
        )
    copy = copy.to(base.device)
    if not (torch.equal(copy.to(base.dtype), base) or torch.equal(base.to(copy.dtype), copy)):
        raise FormatError(f"the adapter holds a {name} that is not the model's: is it for another base model?")


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors, named as in `adapter_state`, into an adapted model. Copies of the base's weights stay out.

    Raises:
        FormatError: as `check_adapter`.
    """
    check_adapter(model, state)
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        if name not in BASE_COPIES:
            own[name].copy_(tensor)


@torch.no_grad()
def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Add every update to its base weight and put plain linear layers back, in place.

    The sum is formed in fp32 and rounded once. A quantized base is dequantized, all of it, and the model's configuration is
    that of a plain one then. A head that is tied to the embedding gets a weight of its own, and the model's configuration
    says so: the adapter changes the head alone.

    Args:
        dtype: that every parameter is rounded to; None: that of the base.
    """
    quantized = has_quantized_layers(model)
    for name, layer in list(adapted_layers(model)):
        linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged = layer.merged().to(dtype or layer.base_dtype)
        tied = False
        if isinstance(model, LlamaForCausalLM) and name == "lm_head":
            tied = model.config.tie_word_embeddings
            model.config = replace(model.config, tie_word_embeddings=False)
        if layer.scheme is None and not tied and merged.dtype == layer.weight.dtype:
            linear.weight = layer.weight  # the same memory
            linear.weight.copy_(merged)
        else:
            linear.weight = nn.Parameter(merged, requires_grad=False)
        linear.bias = layer.bias  # type: ignore[assignment]
        replace_layer(model, name, linear.train(layer.training))
    if quantized:
        dequantize_layers(model, dtype)
        if isinstance(model, LlamaForCausalLM):
            model.config = plain(model.config)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model
