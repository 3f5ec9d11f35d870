"""Low-rank adaptation from its options."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arriero.adapters.lora import LoRAConfig, apply_lora, initial_values, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.engine.loading import LoadedModel, with_adapter
from arriero.formats import peft
from arriero.formats.parts import Placement
from arriero.parallel.materialize import Values
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.weights import AdapterWeights


def lora_weights(loaded: LoadedModel, options: FinetuneOptions) -> tuple[AdapterWeights, Values | None]:
    """Put fresh or stored adapters on the model, in place; see `arriero.training.methods.build.build_weights`."""
    adapter = options.adapter
    state = None
    if adapter.lora_path:
        stored, state = peft.load_adapter(Path(adapter.lora_path))
        config = from_peft(stored)
    else:
        config = LoRAConfig(
            rank=adapter.lora_rank,
            alpha=adapter.lora_alpha or 2.0 * adapter.lora_rank,
            dropout=adapter.lora_dropout,
            target_modules=tuple(adapter.lora_target_modules),
            bias=adapter.lora_bias,  # type: ignore[arg-type]
        )
    seed = options.optimization.seed
    names = apply_lora(loaded.model, config, seed)
    values = loaded.values
    if values is not None:
        values = with_adapter(values, state) if state is not None else _with_fresh_adapter(values, seed)
    elif state is not None:
        load_adapter_state(loaded.model, state)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    total = loaded.model.config.num_parameters()
    print(
        f"LoRA: rank {config.rank} on {len(names)} layers, {trained:,} trained parameters ({trained / total:.2%} of {total:,})"
    )
    return AdapterWeights(loaded.model, config, options.model.model_name_or_path), values


def _with_fresh_adapter(values: Values, seed: int) -> Values:
    def value(name: str, placement: Placement) -> Tensor:
        if ".lora_" not in name:
            return values(name, placement)
        return initial_values(name, placement.box, placement.shape, seed)

    return value
