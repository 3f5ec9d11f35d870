"""A GGUF file of a LLaMA-family model -> an HF folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.gguf.file import GGUFFile
from arriero.formats.gguf.tokenizer import tokenizer_files
from arriero.formats.hf import check_state, parse_dtype, save_model
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig

# GGUF architecture -> HF model_type. Mistral and SmolLM files call themselves "llama".
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFConversion:
    """What `convert_gguf` wrote.

    Attributes:
        config: of the new folder.
        tensor_types: how many tensors of each ggml type the file had.
        licence: `general.license` of the file, if it has one.
    """

    config: LlamaConfig
    tensor_types: dict[str, int]
    licence: str | None


def convert_gguf(
    path: str | Path,
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    max_shard_size: str | int = "5GB",
    extra_files: Mapping[str, bytes] | None = None,
) -> GGUFConversion:
    """Dequantise a GGUF file into an HF folder with configuration, tokenizer, chat template and generation defaults.

    One shard's tensors are in memory at a time.

    Args:
        dtype: of the weights; fp32 holds every quantised value exactly.
        extra_files: files to put beside, e.g. a licence.

    Raises:
        FormatError: for a broken file, an unsupported architecture, or a folder that cannot be written.
    """
    source = str(path)
    with GGUFFile(path) as file:
        config = read_config(file)
        names = {hf_name(name, source): name for name in file.tensors if name != _ROPE_FREQUENCIES}
        check_state(config, {name: file.tensors[original].shape for name, original in names.items()}, source)
        tokenizer = tokenizer_files(file.metadata, config.vocab_size, source)
        state = {name: _lazy(file, original, config) for name, original in sorted(names.items(), key=_model_order)}
        save_model(
            state,
            config,
            folder,
            max_shard_size=max_shard_size,
            dtype=parse_dtype(dtype),
            extra_files={**tokenizer, **(extra_files or {})},
        )
        types: dict[str, int] = {}
        for tensor in file.tensors.values():
            types[tensor.type_name] = types.get(tensor.type_name, 0) + 1
        licence = file.metadata.get("general.license")
        return GGUFConversion(config, types, licence if isinstance(licence, str) else None)


def hf_name(name: str, source: str = "GGUF") -> str:
    """The HF name of a GGUF tensor.

    Raises:
        FormatError: for a tensor that no supported model has (an expert's, say).
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise FormatError(f"{source}: tensor {name!r} belongs to no model of the LLaMA family that is supported")
    return f"model.layers.{int(match[1])}.{_LAYER[match[2]]}.{match[3]}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of the rows of a query or key projection of architecture "llama".

    Its RoPE rotates neighbouring pairs (rows 0,1 / 2,3 / …), HF's rotates halves (rows i and i + head_dim/2), so the
    converter interleaved the halves of every head: (heads, 2, head_dim/2) became (heads, head_dim/2, 2).

    Args:
        weight: (heads * head_dim, ...), a matrix or a bias.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_config(file: GGUFFile) -> LlamaConfig:
    """The configuration out of a file's metadata and tensors.

    Raises:
        FormatError: naming the missing or unsupported key.
    """
    reader = _Metadata(file)
    architecture = reader.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FormatError(
            f"{file.path}: general.architecture {architecture[:40]!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    reader.prefix = f"{architecture}."
    if reader.integer("expert_count", 0):
        raise FormatError(f"{file.path}: is a mixture of experts, which is not supported")
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    key_value_heads = reader.integer("attention.head_count_kv", heads)
    if heads < 1 or key_value_heads < 1:
        raise FormatError(f"{file.path}: attention.head_count is {heads}, attention.head_count_kv {key_value_heads}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(f"{file.path}: has no token_embd.weight; this is not a whole model")
    head_dim = reader.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(key, head_dim) != head_dim:
            raise FormatError(f"{file.path}: {key} is {reader.integer(key)}, but a head has {head_dim} dimensions")
    context = reader.integer("context_length")
    values: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": reader.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, reader, context, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "bos_token_id": reader.token("bos"),
        "eos_token_id": _end_tokens(reader),
        "pad_token_id": reader.token("padding"),
        "torch_dtype": "float32",
    }
    if architecture != "qwen2":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    window = reader.integer("attention.sliding_window", 0)
    if window and architecture == "llama":
        values["model_type"], values["sliding_window"] = "mistral", window
        values.pop("attention_bias")
        values.pop("mlp_bias")
    return LlamaConfig.from_dict(values, source=str(file.path))


class _Metadata:
    """Typed access to a file's metadata; keys of the architecture are named without their prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = ""

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one number a layer, all the same
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self.file.path}: {self.prefix}{key} must be one whole number, got {str(value)[:40]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{self.file.path}: {self.prefix}{key} must be a number, got {str(value)[:40]}")
        # The file has fp32: its shortest form is what the model's own config.json says (1e-05, not 9.99999974e-06).
        return float(str(np.float32(value)))

    def string(self, key: str) -> str:
        value = self._value(key, None)
        if not isinstance(value, str):
            raise FormatError(f"{self.file.path}: {self.prefix}{key} must be a text, got {str(value)[:40]}")
        return value

    def has(self, key: str) -> bool:
        return f"{self.prefix}{key}" in self.file.metadata

    def token(self, role: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) and value != 0xFFFFFFFF else None

    def _value(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.prefix}{key}", default)
        if value is None:
            raise FormatError(f"{self.file.path}: the metadata has no {self.prefix}{key}; this is not a whole model")
        return value


def _end_tokens(reader: _Metadata) -> int | list[int] | None:
    found = [token for role in ("eos", "eot", "eom") if (token := reader.token(role)) is not None]
    distinct = list(dict.fromkeys(found))
    return distinct if len(distinct) > 1 else distinct[0] if distinct else None


def _rope_scaling(file: GGUFFile, reader: _Metadata, context: int, head_dim: int) -> dict[str, Any] | None:
    if _ROPE_FREQUENCIES in file.tensors:
        return _llama3_scaling(file, reader.number("rope.freq_base", 10000.0), head_dim)
    if reader.has("rope.scale_linear"):  # before `rope.scaling.type` existed
        factor = reader.number("rope.scale_linear")
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    kind = reader.string("rope.scaling.type") if reader.has("rope.scaling.type") else "none"
    if kind == "none":
        return None
    factor = reader.number("rope.scaling.factor")
    if factor < 1.0:
        raise FormatError(f"{file.path}: rope.scaling.factor is {factor}, at least 1 is needed")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise FormatError(f"{file.path}: rope.scaling.type {kind[:40]!r} is not supported; 'linear' and 'yarn' are")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": reader.integer("rope.scaling.original_context_length", context),
    }
    for key in ("beta_fast", "beta_slow"):
        if reader.has(f"rope.scaling.yarn_{key}"):
            scaling[key] = reader.number(f"rope.scaling.yarn_{key}")
    attention = reader.number("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:
        # llama.cpp multiplies YaRN's own factor, HF replaces it.
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover LLaMA 3.1's RoPE scaling from the divisors of the frequencies that the converter stored in its place.

    The published models share everything but the factor, which is the largest divisor; the guess must reproduce the
    stored divisors, or the file is refused. Formula: `LlamaModel.generate_extra_tensors` of llama.cpp's converter.
    """
    stored = file.dequantize(_ROPE_FREQUENCIES).astype(np.float64).ravel()
    factor, context = float(str(np.float32(stored.max()))), 8192
    if stored.size == head_dim // 2 and np.isfinite(stored).all() and factor >= 1.0:
        wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((context / wavelength - 1.0) / 3.0, 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise FormatError(
        f"{file.path}: {_ROPE_FREQUENCIES} is not the RoPE scaling of LLaMA 3.1, the only kind that can be read back"
    )


def _lazy(file: GGUFFile, name: str, config: LlamaConfig) -> LazyTensor:
    permuted = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    # Of the architectures, only "llama" has a converter that reorders (Qwen's uses halves in llama.cpp too).
    reorder = permuted is not None and config.model_type in ("llama", "mistral")
    heads = config.num_attention_heads if permuted and permuted[1] == "q" else config.num_key_value_heads

    def load() -> Tensor:
        tensor = torch.from_numpy(file.dequantize(name))
        return unpermute(tensor, heads) if reorder else tensor

    return LazyTensor(file.tensors[name].shape, torch.float32, load)


def _model_order(item: tuple[str, str]) -> tuple[int, int, str]:
    """Embedding, layers by number, norm, head: the order in which a model is read."""
    name = item[0]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None:
        return 1, int(layer[1]), name
    return (0 if name.startswith("model.embed_tokens") else 2 if name.startswith("model.norm") else 3), 0, name
