"""A model's configuration as the metadata of a GGUF file.

The keys are those that llama.cpp's convert_hf_to_gguf.py writes (conversion/base.py `TextModel.set_gguf_parameters`,
conversion/llama.py); where llama.cpp reads another key than its converter writes, the one that is read (YaRN's factor).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from arriero.errors import FormatError, require
from arriero.formats.gguf.container import Value
from arriero.formats.gguf.llama3_rope import own_keys
from arriero.formats.gguf.names import architecture_of
from arriero.models.config import LlamaConfig
from arriero.models.family import SLIDING

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

# The beginning of a licence's text, blanks folded -> its SPDX name as the Hub writes it.
_LICENCES = (
    (re.compile(r"apache license,? version 2\.0"), "apache-2.0"),
    (re.compile(r"mit license|permission is hereby granted, free of charge"), "mit"),
    (re.compile(r"llama 3\.3 community license"), "llama3.3"),
    (re.compile(r"llama 3\.2 community license"), "llama3.2"),
    (re.compile(r"llama 3\.1 community license"), "llama3.1"),
    (re.compile(r"meta llama 3 community license"), "llama3"),
    (re.compile(r"llama 2 community license"), "llama2"),
)
_LICENCE_START = 4096


def model_metadata(config: LlamaConfig, name: str, files: Mapping[str, bytes], file_type: int) -> dict[str, Value]:
    """All keys but the tokenizer's, in the order of the converter.

    Args:
        name: of the model, for people.
        files: those beside the weights; a licence is named after its text.
        file_type: `general.file_type`.

    Raises:
        FormatError: for a model that llama.cpp would compute otherwise.
    """
    architecture = architecture_of(config)
    parameters = config.num_parameters()
    values: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.size_label": str(require("gguf.utility", "gguf").size_label(parameters, 0, 0, 0)),
        **licence_keys(files),
    }
    own: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **_rope_keys(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if SLIDING in config.layer_types:
        own["attention.sliding_window"] = config.sliding_window or 0
    own |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    values |= {f"{architecture}.{key}": value for key, value in own.items()} | own_keys(config)
    return values | {"general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION}


def notes(config: LlamaConfig) -> list[str]:
    """What llama.cpp does otherwise with a model of this configuration, a line each."""
    found = []
    if SLIDING in config.layer_types:
        found.append(
            f"llama.cpp attends to the whole text, not only to a window of {config.sliding_window} tokens: "
            "longer texts come out differently"
        )
    scaling = config.rope_scaling or {"rope_type": "default"}
    betas = (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    if scaling["rope_type"] == "yarn" and betas != (32, 1):
        found.append("llama.cpp computes YaRN with beta_fast 32 and beta_slow 1, whatever the file says")
    return found


def check_expressible(config: LlamaConfig, source: str) -> None:
    """Refuse what a GGUF file of the model's architecture cannot say, before anything is written.

    Raises:
        FormatError: naming the setting and the way out.
    """
    architecture, scaling = architecture_of(config), config.rope_scaling or {"rope_type": "default"}
    kind, own = scaling["rope_type"], f"in files of the architecture {architecture!r}"
    obstacles = {
        f"a sliding window ({config.sliding_window} tokens) {own}": SLIDING in config.layer_types
        and architecture != "llama",
        "dynamic RoPE scaling": kind == "dynamic",
        f"RoPE scaling of the type 'llama3' {own}": kind == "llama3" and architecture != "llama",
        "YaRN with truncate: false": kind == "yarn" and not scaling.get("truncate", True),
        f"a RoPE factor below 1 ({scaling.get('factor')})": scaling.get("factor", 1) < 1,
        f"a bias of o_proj (attention_bias) {own}": config.attention_output_bias and architecture != "llama",
    }
    for what, there in obstacles.items():
        if there:
            raise FormatError(f"{source}: GGUF has no word for {what}: convert to hf instead")


def _rope_keys(config: LlamaConfig) -> dict[str, Value]:
    keys: dict[str, Value] = {"rope.freq_base": float(config.rope_theta)}
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] not in ("linear", "yarn"):
        return keys
    factor = float(scaling["factor"])
    keys |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": factor}
    if scaling["rope_type"] == "linear":
        return keys
    keys["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key) is not None:
            keys[f"rope.scaling.yarn_{key}"] = float(scaling[key])
    attention, plain = _attention_factor(scaling, factor), 0.1 * math.log(factor) + 1.0
    if not math.isclose(attention, plain, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = attention / plain  # llama.cpp multiplies YaRN's own factor, HF replaces it
    return keys


def _attention_factor(scaling: Mapping[str, float], factor: float) -> float:
    """The factor on cos and sin, as `arriero.models.rope` has it."""

    def of_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is not None:
        return float(attention)
    part, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return of_scale(part) / of_scale(whole) if part and whole else of_scale(1.0)


def licence_keys(files: Mapping[str, bytes]) -> dict[str, Value]:
    """`general.license` of a licence file among those beside the weights; nothing where there is none."""
    names = sorted(name for name in files if Path(name).stem.upper() in ("LICENSE", "LICENCE"))
    if not names:
        return {}
    text = files[names[0]][:_LICENCE_START].decode("utf-8", errors="replace")
    folded = " ".join(text.lower().split())
    for pattern, name in _LICENCES:
        if pattern.search(folded):
            return {"general.license": name}
    title = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return {"general.license": "other", **({"general.license.name": title[:100]} if title else {})}
