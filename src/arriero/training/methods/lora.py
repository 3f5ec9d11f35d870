"""Low-rank adaptation from its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.fresh import FreshAdapter
from arriero.adapters.lora import LoRAConfig, adapted_layers, apply_lora, check_adapter, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.config.adapter import AdapterOptions
from arriero.engine.loading import LoadedModel, with_adapter
from arriero.errors import ConfigError
from arriero.formats import peft
from arriero.formats.download import published_name
from arriero.formats.parts import Placement
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.materialize import Values
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.weights import AdapterWeights


def lora_weights(loaded: LoadedModel, options: FinetuneOptions) -> tuple[AdapterWeights, Values | None]:
    """Put fresh or stored adapters on the model, in place; see `arriero.training.methods.build.build_weights`."""
    adapter = options.adapter
    state = None
    if adapter.lora_path:
        stored, state = peft.load_adapter(Path(adapter.lora_path))
        config = replace(from_peft(stored), plus_scale=adapter.lora_plus_scale)
        tell_options(adapter, config)
    else:
        config = LoRAConfig(
            rank=adapter.lora_rank,
            alpha=adapter.alpha,
            dropout=adapter.lora_dropout,
            target_modules=tuple(adapter.lora_target_modules),
            bias=adapter.lora_bias,  # type: ignore[arg-type]
            use_rslora=adapter.lora_rslora,
            use_dora=adapter.lora_dora,
            pissa=adapter.lora_init == "pissa",
            plus_scale=adapter.lora_plus_scale,
        )
    seed = options.optimization.seed
    names = apply_lora(loaded.model, config, seed, fresh=state is None)
    if "lm_head" in names:  # the loss takes the head's weight as it is
        raise ConfigError(
            "the output head (lm_head) cannot be trained by an adapter: leave it out of the target modules"
        )
    values = loaded.values
    if state is not None:
        check_adapter(loaded.model, state)
        if values is None:
            load_adapter_state(loaded.model, state)
        else:
            values = with_adapter(values, state)
    elif values is not None:
        values = with_fresh_adapter(values, loaded.model, config, seed, loaded.device)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    total = loaded.model.config.num_parameters()
    kind = "DoRA" if config.use_dora else "PiSSA" if config.pissa else "rsLoRA" if config.use_rslora else "LoRA"
    print(
        f"{kind}: rank {config.rank} on {len(names)} layers, {trained:,} trained parameters "
        f"({trained / total:.2%} of {total:,})"
    )
    base, rounded = published_name(options.model.model_name_or_path), options.quantization.quantize_base
    return AdapterWeights(loaded.model, config, base, rounded), values


def tell_options(adapter: AdapterOptions, config: LoRAConfig) -> None:
    """Let a run's options, which are written down with it, be those of the adapter that it goes on with."""
    adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout = config.rank, config.alpha, config.dropout
    if not isinstance(config.target_modules, str):  # a pattern is no list of names
        adapter.lora_target_modules = list(config.target_modules)
    adapter.lora_bias = config.bias
    adapter.lora_rslora, adapter.lora_dora = config.use_rslora, config.use_dora


def with_fresh_adapter(
    values: Values, model: LlamaForCausalLM, config: LoRAConfig, seed: int, device: torch.device
) -> Values:
    """The values of an adapted model on the meta device: the base's, and those of a fresh adapter.

    Args:
        model: whole yet, with its adapters.
        device: where what depends on the base is computed: each process does it alone, from the whole base weight.
    """
    layers = {name: (layer.scheme, layer.out_features, layer.in_features) for name, layer in adapted_layers(model)}

    def base(name: str) -> Tensor:
        scheme, rows, columns = layers[name]
        if scheme is None:
            return values(f"{name}.weight", Placement.whole((rows, columns))).to(device)
        shapes = scheme.weight_tensors(rows, columns)
        stored = {part: values(f"{name}.{part}", Placement.whole(shape)) for part, (shape, _) in shapes.items()}
        return scheme.dequantize({part: tensor.to(device) for part, tensor in stored.items()})

    fresh = FreshAdapter(config, seed, base)

    def value(name: str, placement: Placement) -> Tensor:
        return fresh(name, placement.box, placement.shape) if ".lora_" in name else values(name, placement)

    return value
