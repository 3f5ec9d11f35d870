"""LoRA configurations in PEFT's words and in ours."""

from __future__ import annotations

from arriero.adapters.lora import LoRAConfig
from arriero.adapters.pissa import as_plain
from arriero.formats import peft


def to_peft(config: LoRAConfig, base_model: str) -> peft.PeftLoraConfig:
    """Our LoRA configuration in PEFT's words; of PiSSA that of the ordinary adapter which its file holds."""
    config = as_plain(config)
    targets = config.target_modules if isinstance(config.target_modules, str) else tuple(config.target_modules)
    return peft.PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        base_model_name_or_path=base_model,
    )


def from_peft(config: peft.PeftLoraConfig) -> LoRAConfig:
    """PEFT's LoRA configuration as ours."""
    return LoRAConfig(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        bias=config.bias,  # type: ignore[arg-type]
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
    )
