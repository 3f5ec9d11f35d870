"""Reading a GGUF file of a LLaMA-family model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.gguf.file import GGUFFile
from arriero.formats.gguf.llama3_rope import scaling_of
from arriero.formats.gguf.names import ARCHITECTURES, ROPE_FREQUENCIES, heads_of, hf_name
from arriero.formats.gguf.tokenizer import tokenizer_files
from arriero.formats.hf import check_state, parse_dtype, save_model
from arriero.formats.rope_layout import pairs_to_halves
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig


def open_gguf(path: str | Path) -> ModelSource:
    """A GGUF file, open for reading: its tensors dequantised to fp32 (which holds every quantised value exactly) when they
    are loaded.

    Raises:
        FormatError: for a broken file, an unsupported architecture or tokenizer, or tensors that do not fit the metadata.
    """
    source = str(path)
    file = GGUFFile(path)
    try:
        config = read_config(file)
        names = {hf_name(name, source): name for name in file.tensors if name != ROPE_FREQUENCIES}
        check_state(config, {name: file.tensors[original].shape for name, original in names.items()}, source)
        files = tokenizer_files(file.metadata, config.vocab_size, source)
    except BaseException:
        file.close()
        raise
    tensors = {name: _lazy(file, original, config) for name, original in sorted(names.items(), key=_model_order)}
    return ModelSource(file.path, "gguf", config, tensors, files, _about(file), file.close)


# ggml's types whose numbers torch has as they are.
_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}


def convert_gguf(
    path: str | Path,
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    max_shard_size: str | int = "5GB",
    extra_files: Mapping[str, bytes] | None = None,
) -> ModelSource:
    """Write a GGUF file as an HF folder, with configuration, tokenizer, chat template and generation defaults.

    One shard's tensors are in memory at a time.

    Args:
        dtype: of the weights.
        extra_files: files to put beside, e.g. a licence.

    Returns:
        What was converted, closed.

    Raises:
        FormatError: as `open_gguf`, or for a folder that cannot be written.
    """
    with open_gguf(path) as source:
        save_model(
            source.tensors,
            source.config,
            folder,
            max_shard_size=max_shard_size,
            dtype=parse_dtype(dtype),
            extra_files={**source.files, **(extra_files or {})},
        )
    return source


def _about(file: GGUFFile) -> tuple[str, ...]:
    counts = Counter(tensor.type_name for tensor in file.tensors.values())
    lines = ["tensors " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))]
    licence = file.metadata.get("general.license")
    return (*lines, f"licence {licence[:100]}") if isinstance(licence, str) and licence.isprintable() else tuple(lines)


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
        "torch_dtype": _dtype(file),
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
    if ROPE_FREQUENCIES in file.tensors:
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
        # llama.cpp multiplies YaRN's own factor, HF replaces it: of the numbers that the file may mean, a short one.
        own = 0.1 * math.log(factor) + 1.0
        short = float(f"{attention * own:.6g}")
        same = np.float32(short / own) == np.float32(attention)
        scaling["attention_factor"] = short if same else attention * own
    return scaling


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    scaling = scaling_of(file.dequantize(ROPE_FREQUENCIES), theta, head_dim, file.metadata)
    if scaling is None:
        raise FormatError(
            f"{file.path}: the divisors in {ROPE_FREQUENCIES} are not those of LLaMA 3.1's RoPE scaling with low_freq_factor 1 "
            "and high_freq_factor 4, the only ones that are read: take the model's original folder"
        )
    return scaling


def _lazy(file: GGUFFile, name: str, config: LlamaConfig) -> LazyTensor:
    heads = heads_of(name, config)

    dtype = _PLAIN.get(file.tensors[name].type_name, torch.float32)

    def load() -> Tensor:
        tensor = torch.from_numpy(file.dequantize(name)).to(dtype)
        return tensor if heads is None else pairs_to_halves(tensor, heads)

    return LazyTensor(file.tensors[name].shape, dtype, load)


def _dtype(file: GGUFFile) -> str:
    """Of the matrices, if they have one that torch has; norms are in F32 in any file."""
    kinds = {tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return str(_PLAIN.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32).removeprefix("torch.")


def _model_order(item: tuple[str, str]) -> tuple[int, int, str]:
    """Embedding, layers by number, norm, head: the order in which a model is read."""
    name = item[0]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None:
        return 1, int(layer[1]), name
    return (0 if name.startswith("model.embed_tokens") else 2 if name.startswith("model.norm") else 3), 0, name
