"""The `config.json` of PaddleNLP <-> the configuration of a decoder.

PaddleNLP leaves out keys whose value is its own default, so an absent key means that default
(paddlenlp/transformers/{llama,qwen2,mistral}/configuration.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object
from arriero.formats.paddle.names import base_prefix
from arriero.models.config import LlamaConfig
from arriero.models.config_reader import ConfigReader
from arriero.models.family import FAMILIES

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
}
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}
_SLIDING_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
_LINEAR, _NTK, _DYNAMIC = "linear", "ntk", "dynamic_ntk"


@dataclass(frozen=True)
class PaddleConfig:
    """What a Paddle folder's `config.json` says.

    Attributes:
        model: the decoder.
        tensor_parallel_degree: processes that the weights were saved by; 1 for whole weights.
        about: lines for the user about what was read in a way that is not plain.
    """

    model: LlamaConfig
    tensor_parallel_degree: int = 1
    about: tuple[str, ...] = ()


def read_paddle_config(folder: str | Path) -> PaddleConfig:
    """Read the `config.json` of a Paddle folder.

    Raises:
        FormatError: when it is missing or broken, or describes a model that is none of ours.
    """
    path = Path(folder) / "config.json"
    old = "; model_config.json of PaddleNLP before 2.5 is not read: save the model with PaddleNLP 2.5 or later"
    hint = old if path.with_name("model_config.json").is_file() else ""
    return paddle_config_of(read_json_object(path, f"a Paddle model folder needs it{hint}"), str(path))


def paddle_config_of(values: Mapping[str, Any], source: str = "config.json") -> PaddleConfig:
    """As `read_paddle_config`, of the file's content."""
    family = _family(values, source)
    merged: dict[str, Any] = {**_DEFAULTS[family], **_without_aliases(values)}
    reader = ConfigReader(merged, source)
    if reader.boolean("alibi", False):
        raise FormatError(f"{source}: alibi is true: a model with ALiBi positions is not supported, only RoPE is")
    if reader.boolean("use_long_sequence_strategies", False):
        raise FormatError(f"{source}: use_long_sequence_strategies is true, which is not supported; only RoPE is")
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if heads < 1 or hidden % heads:
        raise FormatError(f"{source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    kept = ("num_key_value_heads", "hidden_act", *_SLIDING_KEYS)
    found: dict[str, Any] = {key: merged[key] for key in (*_DEFAULTS[family], *kept) if key in merged}
    rope, about = _rope(reader, family, hidden // heads)
    found |= rope
    found |= {"model_type": family, "head_dim": hidden // heads, "dtype": _dtype(merged, source)}
    degree = reader.integer("tensor_parallel_degree", 1)
    model = LlamaConfig.from_dict(found, source=source)
    base_prefix(model)
    return PaddleConfig(model, max(degree, 1), about)


def paddle_config(config: LlamaConfig, dtype: str, tensor_parallel_degree: int = 1) -> dict[str, Any]:
    """The content of a `config.json` for PaddleNLP.

    Args:
        dtype: of the weights.

    Raises:
        FormatError: for a model that PaddleNLP cannot compute.
    """
    base_prefix(config)
    if tensor_parallel_degree > 1 and config.num_attention_heads % tensor_parallel_degree:
        heads = config.num_attention_heads
        degrees = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        raise FormatError(
            f"tensor_parallel_degree {tensor_parallel_degree} does not divide num_attention_heads "
            f"{config.num_attention_heads}: possible are {degrees}"
        )
    values: dict[str, Any] = {
        "architectures": [FAMILIES[config.model_type].architecture],
        "bos_token_id": config.bos_token_id,
        "dtype": dtype,
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, list) else config.eos_token_id,
        "fuse_attention_ffn": False,
        "fuse_attention_qkv": False,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "seq_length": config.max_position_embeddings,
        "tensor_parallel_degree": tensor_parallel_degree if tensor_parallel_degree > 1 else -1,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "mistral":
        values["sliding_window"] = config.sliding_window
        if config.tie_word_embeddings:
            raise FormatError("PaddleNLP's mistral has no tied head (tie_word_embeddings): convert to hf or gguf")
    elif config.sliding_window is not None:
        raise FormatError("PaddleNLP's qwen2 has no sliding window (sliding_window): convert to hf or gguf")
    return values | _paddle_rope(config)


def _family(values: Mapping[str, Any], source: str) -> str:
    """The model type, of `model_type` or the class's name."""
    named = values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    classes = {family: FAMILIES[family].architecture for family in _DEFAULTS}
    for family, causal in classes.items():
        if causal in names or f"{causal}Pipe" in names:
            return family
    bare = [name for name in names if name.removesuffix("Pipe").endswith("Model")]
    if bare:
        raise FormatError(f"{source}: {bare[0][:60]} is a decoder without a head; save its ForCausalLM model")
    if names:
        raise FormatError(
            f"{source}: the class {names[0][:60]!r} of Paddle is not supported; {', '.join(classes.values())} are"
        )
    model_type = values.get("model_type", "llama")  # the first configurations say neither
    if model_type not in tuple(_DEFAULTS):
        raise FormatError(f"{source}: model_type {str(model_type)[:60]!r} is not supported; {', '.join(_DEFAULTS)} are")
    return str(model_type)


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """As PaddleNLP reads it: an older name of a key sets the newer one."""
    result = {key: value for key, value in values.items() if key not in _ALIASES}
    return result | {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES}


def _dtype(values: Mapping[str, Any], source: str) -> str:
    value = values.get("torch_dtype") or values.get("dtype") or "float32"
    if not isinstance(value, str):
        raise FormatError(f"{source}: dtype must be a name such as 'bfloat16', got {value!r}")
    return value.removeprefix("paddle.").removeprefix("torch.")


def _rope(reader: ConfigReader, family: str, head_dim: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """RoPE in HF's keys, as PaddleNLP's `_init_rope` chooses it, and what to tell the user."""
    nested, kind = reader.values.get("rope_scaling"), reader.values.get("rope_scaling_type")
    if nested is not None and not isinstance(nested, dict):
        raise FormatError(f"{reader.source}: rope_scaling must be an object or null, got {nested!r}")
    theta, positions = reader.number("rope_theta", 10000.0), reader.integer("max_position_embeddings")
    factor = reader.number("rope_scaling_factor", 1.0)
    if kind is not None and family != "llama":
        kind = None  # PaddleNLP's class has the key and does nothing with it
    if nested and nested.get("rope_type") == "llama3" and family == "llama":
        return {"rope_theta": theta, "rope_scaling": nested}, ()
    if kind is None and not nested:
        return {"rope_theta": theta}, ()
    if kind is None:
        return {"rope_theta": theta, "rope_scaling": nested}, (
            "rope_scaling is applied as transformers does; PaddleNLP itself ignores this kind",
        )
    if not math.isfinite(factor) or factor < 1 or positions * factor >= 2**31:
        raise FormatError(f"{reader.source}: rope_scaling_factor must be a number of at least 1, got {factor!r}")
    longer = int(positions * factor)  # the positions that PaddleNLP computes: its length is that before stretching
    if kind == _LINEAR:
        scaling = {"rope_type": "linear", "factor": factor}
        return {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": longer}, ()
    if kind == _NTK:
        if head_dim <= 2:
            raise FormatError(f"{reader.source}: rope_scaling_type 'ntk' needs heads of more than 2")
        stretched = theta * factor ** (head_dim / (head_dim - 2))
        return {"rope_theta": stretched, "max_position_embeddings": longer}, (
            f"rope_scaling_type 'ntk' with the factor {factor:g} became rope_theta {stretched:g}",
        )
    if kind == _DYNAMIC:
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "dynamic", "factor": factor}}, ()
    raise FormatError(
        f"{reader.source}: rope_scaling_type {str(kind)[:40]!r} is not supported; {_LINEAR}, {_NTK} and {_DYNAMIC} are"
    )


def _paddle_rope(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    kind = scaling["rope_type"] if scaling else None
    if scaling is None:
        return {}
    if config.model_type == "llama" and kind == "llama3":
        return {"rope_scaling": dict(scaling)}
    if config.model_type == "llama" and kind == "linear":
        shorter = math.ceil(config.max_position_embeddings / scaling["factor"])
        found = {"rope_scaling_type": _LINEAR, "rope_scaling_factor": scaling["factor"]}
        return found | {"max_position_embeddings": shorter}
    if config.model_type == "llama" and kind == "dynamic" and set(scaling) == {"rope_type", "factor"}:
        return {"rope_scaling_type": _DYNAMIC, "rope_scaling_factor": scaling["factor"]}
    raise FormatError(f"PaddleNLP's {config.model_type} has no RoPE of the type {kind!r}: convert to hf or gguf")
