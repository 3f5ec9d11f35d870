"""What a configuration refuses, keeps and derives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.errors import FormatError
from arriero.models.config import MAX_CONFIG_BYTES, LlamaConfig

NEEDED = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("key", sorted(NEEDED))
def test_a_missing_needed_key_is_named(key: str) -> None:
    values = {name: value for name, value in NEEDED.items() if name != key}
    with pytest.raises(FormatError, match=rf"^here\.json: {key} is missing"):
        LlamaConfig.from_dict(values, source="here.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": 3}, r"model_type 3 is not supported"),
        ({"hidden_size": "32"}, r"hidden_size must be a whole number, got '32'"),
        ({"hidden_size": True}, r"hidden_size must be a whole number, got True"),
        ({"vocab_size": 0}, r"vocab_size must be a whole number from 1 to \d+, got 0"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be a whole number from 1 to 10000, got 1000000000"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be .* got 0"),
        ({"num_attention_heads": -4}, r"num_attention_heads must be .* got -4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, r"head_dim 7 is odd"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported; only 'silu' is"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps must be a number, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a number that is not negative, got nan"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings must be true or false, got 1"),
        ({"eos_token_id": "</s>"}, r"eos_token_id must be a token id or null, got '</s>'"),
        ({"eos_token_id": [2, "x"]}, r"eos_token_id must be a token id, a list of them, or null"),
        ({"torch_dtype": 16}, r"torch_dtype must be a name such as 'bfloat16', got 16"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: quantised weights"),
        ({"rope_theta": -1}, r"rope_theta must be a positive number, got -1"),
        ({"rope_theta": 1}, r"rope_theta must be greater than 1, got 1\.0"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be an object or null, got 'linear'"),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling: rope type 'longrope' is not supported; supported are"),
        ({"rope_scaling": {"rope_type": ["x"]}}, r"rope type \['x'\] is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters: factor is missing; rope type 'linear' needs"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor of rope type 'linear' must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"factor of rope type 'linear' must be .* got '2'"),
        ({"rope_scaling": {k: LLAMA3[k] for k in LLAMA3 if k != "low_freq_factor"}}, r"low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor 1.0 must be greater than"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, r"truncate must be true or false, got 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "a"}}, r"beta_fast must be a positive number"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, r"gives each layer type its own RoPE"),
        (
            {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}},
            r"'dynamic' needs a head_dim greater than 2",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, r"sliding_window must be a whole number of at least 1"),
        ({"model_type": "mistral", "sliding_window": "x"}, r"sliding_window must be a whole number of at least 1"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, r"use_sliding_window is false"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, r"layer_types must name .* each of the 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["linear", "linear"]}, r"layer_types must name"),
        ({"model_type": "qwen2", "layer_types": 3}, r"layer_types must be a list, got 3"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(changes: dict[str, Any], message: str) -> None:
    base = NEEDED | ({"num_key_value_heads": 2} if changes.get("model_type") in ("mistral", "qwen2") else {})
    with pytest.raises(FormatError, match=message) as caught:
        LlamaConfig.from_dict(base | changes, source="config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "qwen2"}, "attention_bias must be True"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias must be False"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias must be False"),
        ({"sliding_window": 4}, "sliding_window must be null for model_type 'llama'"),
        ({"layer_types": ("sliding_attention",) * 2}, "but sliding_window is null"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ("full_attention", "sliding_attention")},
            "layer_types must all be 'sliding_attention'",
        ),
    ],
)
def test_a_combination_no_family_has_is_refused(changes: dict[str, Any], message: str) -> None:
    config = LlamaConfig.from_dict(NEEDED)
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(config, **changes)


def test_immutable() -> None:
    config = LlamaConfig.from_dict(NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


def test_unknown_keys_are_kept_and_never_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    kept = {
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
        "custom": {"nested": [1, None, {"a": 1.5}]},
        "pretraining_tp": 2,
        "architectures": ["SomethingElse"],
        "use_cache": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(NEEDED | kept))
    config = LlamaConfig.from_file(tmp_path)
    assert config.extra == kept
    written = config.to_dict()
    assert {key: written[key] for key in kept} == kept
    assert json.loads(json.dumps(written)) == written
    assert LlamaConfig.from_dict(written) == config


def test_keys_without_effect_in_a_family_stay_as_they_are() -> None:
    values = NEEDED | {"sliding_window": 4096, "use_sliding_window": True}
    config = LlamaConfig.from_dict(values)
    assert config.sliding_window is None
    assert config.to_dict() | values == config.to_dict()
    mistral = LlamaConfig.from_dict(
        NEEDED | {"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True}
    )
    assert not mistral.attention_bias
    assert mistral.to_dict()["attention_bias"] is True


def test_families() -> None:
    small = NEEDED | {"num_key_value_heads": 2}
    llama = LlamaConfig.from_dict(small | {"attention_bias": True})
    assert (llama.attention_bias, llama.attention_output_bias, llama.qk_norm) == (True, True, False)
    qwen2 = LlamaConfig.from_dict(small | {"model_type": "qwen2"})
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = LlamaConfig.from_dict(small | {"model_type": "qwen3"})
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    mistral = LlamaConfig.from_dict(small | {"model_type": "mistral", "sliding_window": 8})
    assert [mistral.layer_sliding_window(layer) for layer in range(2)] == [8, 8]
    by_architecture = {key: value for key, value in small.items() if key != "model_type"}
    assert LlamaConfig.from_dict(by_architecture | {"architectures": ["MistralForCausalLM"]}).model_type == "mistral"


def test_qwen_windows_start_at_max_window_layers() -> None:
    values = NEEDED | {"model_type": "qwen3", "num_key_value_heads": 4, "num_hidden_layers": 4, "head_dim": 8}
    values |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    config = LlamaConfig.from_dict(values)
    assert [config.layer_sliding_window(layer) for layer in range(4)] == [None, None, None, 16]
    assert config.to_dict()["max_window_layers"] == 3
    off = LlamaConfig.from_dict(values | {"use_sliding_window": False})
    assert off.sliding_window is None
    assert set(off.layer_types) == {"full_attention"}


def test_token_ids() -> None:
    config = LlamaConfig.from_dict(NEEDED | {"eos_token_id": [3, 4], "pad_token_id": -1, "bos_token_id": None})
    assert config.eos_token_ids == (3, 4)
    assert config.pad_token_id is None
    assert config.bos_token_id is None
    assert LlamaConfig.from_dict(NEEDED).eos_token_ids == (2,)
    assert LlamaConfig.from_dict(NEEDED | {"eos_token_id": None}).eos_token_ids == ()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: cannot be read \(No such file"):
        LlamaConfig.from_file(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        LlamaConfig.from_file(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FormatError, match="is not valid JSON"):
        LlamaConfig.from_file(path)
    path.write_text("[" * 100_000)
    with pytest.raises(FormatError, match="is not valid JSON"):
        LlamaConfig.from_file(path)
    path.write_text("[]")
    with pytest.raises(FormatError, match="must hold a JSON object, got list"):
        LlamaConfig.from_file(path)
    with path.open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(FormatError, match="is larger than"):
        LlamaConfig.from_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(LlamaConfig.__dataclass_fields__) + ["torch_dtype", "rope_parameters", "use_sliding_window", "extra"]


@settings(max_examples=300)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4)
)
def test_any_json_is_read_or_refused_in_one_line(model_type: str, changes: dict[str, Any]) -> None:
    values = NEEDED | {"num_key_value_heads": 2, "model_type": model_type} | changes
    try:
        written = LlamaConfig.from_dict(values).to_dict()
    except FormatError as error:
        message = str(error)
    else:
        message = "" if LlamaConfig.from_dict(written).to_dict() == written or "nan" in repr(written) else "not stable"
    assert "\n" not in message
    assert message != "not stable"
