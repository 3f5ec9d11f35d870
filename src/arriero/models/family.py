"""What each `model_type` fixes or defaults to; the decoder itself is one for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What a `model_type` of transformers fixes or defaults to (its configuration class and modelling file)."""

    architecture: str
    # "read": the key `attention_bias` decides; otherwise what the modelling file hard-codes for q, k and v.
    qkv_bias: bool | Literal["read"]
    # Whether o_proj has a bias whenever q, k and v have one.
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    # "none": the key `sliding_window` has no effect; "all": every layer; "chosen": by layer_types and its older keys.
    sliding: Literal["none", "all", "chosen"]
    num_key_value_heads: int | None
    head_dim: int | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | None


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "read", True, True, False, "none", None, None, 2048, 1, 2),
    "mistral": Family("MistralForCausalLM", False, False, False, False, "all", 8, None, 131072, 1, 2),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False, False, "chosen", 32, None, 32768, None, None),
    "qwen3": Family("Qwen3ForCausalLM", "read", True, False, True, "chosen", 32, 128, 32768, None, None),
}

FULL, SLIDING = "full_attention", "sliding_attention"
