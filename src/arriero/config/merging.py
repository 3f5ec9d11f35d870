"""Joining an adapter, or the shards of a model, into one model folder."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import REQUIRED, OptionGroup, option


@dataclass(kw_only=True)
class MergeOptions(OptionGroup):
    """Merging."""

    output_path: str = option(REQUIRED, "folder the merged model is written to", aliases=("output_dir",))
    adapter_weights: list[float] = option(
        [],
        "of several adapters (--lora_path a,b): the factor on the additions of each (default: 1)",
        only_with="lora_path",
    )
    output_kind: str = option(
        "model",
        "what is written: the whole model, or an adapter that stands for all those of --lora_path",
        ("model", "adapter"),
        only_with="lora_path",
    )
    max_shard_size: str = option("5GB", "largest safetensors file; a larger model is cut into several")
    verify: bool = option(True, "compare the merged model's logits with those of the parts; they must agree")
