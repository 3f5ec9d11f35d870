"""Joining an adapter, or the shards of a model, into one model folder."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import REQUIRED, OptionGroup, option


@dataclass(kw_only=True)
class MergeOptions(OptionGroup):
    """Merging."""

    output_path: str = option(REQUIRED, "folder the merged model is written to", aliases=("output_dir",))
    max_shard_size: str = option("5GB", "largest safetensors file; a larger model is cut into several")
    verify: bool = option(True, "compare the merged model's logits with those of the parts; they must agree")
