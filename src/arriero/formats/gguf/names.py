"""How the tensors of a LLaMA-family model are called in GGUF files, and which are stored in another order."""

from __future__ import annotations

import re
from typing import NamedTuple

from arriero.errors import FormatError
from arriero.models.config import LlamaConfig

# GGUF architecture -> HF model_type. Mistral and SmolLM files call themselves "llama".
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FREQUENCIES = "rope_freqs.weight"

_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES = {hf: name for name, hf in _GLOBAL.items()}
_LAYER_NAMES = {hf: name for name, hf in _LAYER.items()}
_GGUF_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_HF_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.([\w.]+)\.(weight|bias)")
_PERMUTED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


class NameRow(NamedTuple):
    """One row of the table of names.

    Attributes:
        hf: pattern of the HF name, ``{layer}`` standing for the layer's number.
        gguf: pattern of the GGUF name.
        permuted: whether files of the architecture "llama" hold its rows in another order (see `rope_layout`).
    """

    hf: str
    gguf: str
    permuted: bool


def name_table() -> list[NameRow]:
    """Every pattern of names in both worlds, weights only (a bias is called alike), in the model's order."""
    rows = [NameRow("model.embed_tokens.weight", "token_embd.weight", False)]
    rows += [
        NameRow(f"model.layers.{{layer}}.{hf}.weight", f"blk.{{layer}}.{name}.weight", name in ("attn_q", "attn_k"))
        for name, hf in _LAYER.items()
    ]
    rows += [NameRow(f"{_GLOBAL[name]}.weight", f"{name}.weight", False) for name in ("output_norm", "output")]
    return rows


def architecture_of(config: LlamaConfig) -> str:
    """`general.architecture` of a model's GGUF file."""
    return "llama" if config.model_type == "mistral" else config.model_type


def hf_name(name: str, source: str = "GGUF") -> str:
    """The HF name of a GGUF tensor.

    Raises:
        FormatError: for a tensor that no supported model has (an expert's, say).
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _GLOBAL and leaf == "weight":
        return f"{_GLOBAL[stem]}.weight"
    match = _GGUF_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise FormatError(f"{source}: tensor {name!r} belongs to no model of the LLaMA family that is supported")
    return f"model.layers.{int(match[1])}.{_LAYER[match[2]]}.{match[3]}"


def gguf_name(name: str, source: str = "the model") -> str:
    """The GGUF name of a tensor of an HF folder; undoes `hf_name`.

    Raises:
        FormatError: for a name that no model of the family has.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _GLOBAL_NAMES and leaf == "weight":
        return f"{_GLOBAL_NAMES[stem]}.weight"
    match = _HF_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise FormatError(f"{source}: {name} has no name in GGUF files")
    return f"blk.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def permuted_heads(name: str, architecture: str, heads: int, key_value_heads: int) -> int | None:
    """How many heads a tensor with this GGUF name is reordered by; None for one that is stored as HF has it.

    Of the architectures, only "llama" is reordered (`LlamaModel.permute` of llama.cpp's converter); Qwen's RoPE works on
    halves in llama.cpp too.
    """
    match = _PERMUTED.fullmatch(name)
    if match is None or architecture != "llama":
        return None
    return heads if match[1] == "q" else key_value_heads


def heads_of(name: str, config: LlamaConfig) -> int | None:
    """`permuted_heads` of a whole model's tensor."""
    return permuted_heads(name, architecture_of(config), config.num_attention_heads, config.num_key_value_heads)
