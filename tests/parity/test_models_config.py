"""config.json both ways with transformers' AutoConfig."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.models.config import LlamaConfig

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.2}
# What both sides must agree on, whatever else a file holds.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
)


def assert_same(mine: LlamaConfig, theirs: Any) -> None:
    for key in SHARED:
        assert getattr(mine, key) == getattr(theirs, key), key
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert mine.head_dim == head_dim
    rope = dict(theirs.rope_parameters)
    assert mine.rope_theta == rope.pop("rope_theta")
    assert (mine.rope_scaling or {"rope_type": "default"}) == {k: v for k, v in rope.items() if v is not None}
    if mine.model_type in ("qwen2", "qwen3"):
        assert list(mine.layer_types) == theirs.layer_types
    if any(kind == "sliding_attention" for kind in mine.layer_types):
        assert mine.sliding_window == theirs.sliding_window
    elif mine.model_type != "llama":
        assert mine.sliding_window is None
    assert mine.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
    # The model itself: theirs on the meta device has as many parameters as we count.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    model.tie_weights()
    assert mine.num_parameters() == model.num_parameters()
    embeddings = {id(p): p.numel() for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    assert mine.num_parameters(exclude_embeddings=True) == model.num_parameters() - sum(embeddings.values())


def hf_config(seed: int) -> Any:
    rng = random.Random(seed)
    family = ("llama", "mistral", "qwen2", "qwen3")[seed % 4]
    heads, key_value_heads = rng.choice([(9, 3), (4, 2), (6, 1)])
    values: dict[str, Any] = {
        "vocab_size": rng.randint(50, 99),
        "hidden_size": heads * 8,
        "intermediate_size": rng.randint(20, 70),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": rng.choice([512, 1024]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "eos_token_id": rng.choice([None, 2, [2, 7]]),
        "pad_token_id": rng.choice([None, 0]),
        "dtype": rng.choice([None, "bfloat16", "float32"]),
        "rope_parameters": {"rope_theta": rng.choice([1e4, 5e5])}
        | rng.choice([{"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}, LLAMA3, YARN]),
    }
    if family == "llama":
        values |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5, "head_dim": 16}
    elif family == "mistral":
        values |= {"sliding_window": rng.choice([None, 64])}
    else:
        values |= {"use_sliding_window": rng.random() < 0.5, "sliding_window": 32}
        values |= {"max_window_layers": rng.randint(0, 3)}
    return transformers.AutoConfig.for_model(family, **values)


@pytest.mark.parametrize("seed", range(24))
def test_theirs_to_ours_and_back(seed: int, tmp_path: Path) -> None:
    theirs = hf_config(seed)
    mine = LlamaConfig.from_dict(theirs.to_dict())
    assert_same(mine, theirs)

    theirs.save_pretrained(tmp_path / "theirs")
    assert LlamaConfig.from_file(tmp_path / "theirs").to_dict().keys() >= {"rope_theta", "rope_parameters"}
    assert_same(LlamaConfig.from_file(tmp_path / "theirs" / "config.json"), theirs)

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(mine.to_dict()))
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert_same(mine, again)
    assert LlamaConfig.from_dict(again.to_dict()).rope_scaling == mine.rope_scaling
    assert LlamaConfig.from_dict(mine.to_dict()) == mine


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_keys_default_as_in_transformers(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    mine = LlamaConfig.from_dict({"model_type": family} | {key: getattr(theirs, key) for key in needed})
    assert_same(mine, theirs)


def test_a_transformers_4_file_reads_as_transformers_5_reads_it(tmp_path: Path) -> None:
    # meta-llama/Llama-3.2-1B as published: top-level rope_theta, rope_scaling, torch_dtype.
    values = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    mine = LlamaConfig.from_file(tmp_path)
    assert_same(mine, transformers.AutoConfig.from_pretrained(tmp_path))
    # Everything the file says is still said, in the same words.
    written = mine.to_dict()
    assert {key: written[key] for key in values} == values
