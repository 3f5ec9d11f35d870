"""Presets against published parameter counts, and how names are found."""

from __future__ import annotations

import pytest
import torch

from arriero.errors import ConfigError
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import PRESETS, TINY_RANDOM_LLAMA, find_preset, match_preset

# As published (Hub metadata, model cards, papers); a tied head counts once.
PUBLISHED = {
    "facebook/llama-7b": 6_738_415_616,
    "facebook/llama-13b": 13_015_864_320,
    "facebook/llama-30b": 32_528_943_616,
    "facebook/llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    assert PRESETS[name].config.num_parameters() == PUBLISHED[name]
    for variant in (f"{name}-chat", f"{name}-instruct", f"{name}-base"):
        if variant in PRESETS:
            assert PRESETS[variant].config.num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name == name.lower()
    assert preset.licence
    assert (preset.hub_id is None) == (preset.seed is not None)
    config = preset.config
    assert config.extra == {} or set(config.extra) <= {"attention_bias"}
    assert config.eos_token_ids
    assert max(config.eos_token_ids) < config.vocab_size
    assert find_preset(name) is preset
    assert find_preset(name.upper()) is preset
    if preset.hub_id:
        assert find_preset(preset.hub_id) is preset


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("facebook/llama-7b", "facebook/llama-7b"),
        ("LLaMA-7B", "facebook/llama-7b"),
        ("huggyllama/llama-13b", "facebook/llama-13b"),
        ("meta-llama/Llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b-chat"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b-instruct"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("llama-3.3-70b", "llama-3.3-70b-instruct"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-instruct-v0.3"),
        ("mistral-7b-0.1", "mistral-7b-v0.1"),
        ("IDEA-CCNL/Ziya-LLaMA-13B-v1", "idea-ccnl/ziya-llama-13b-v1"),
        (" SmolLM2-135M-Instruct ", "smollm2-135m-instruct"),
        ("tiny-random-llama", TINY_RANDOM_LLAMA),
    ],
)
def test_names_aliases_and_hub_ids(name: str, found: str) -> None:
    assert find_preset(name).name == found


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"by the name 'smolm2-135m': did you mean smollm2-135m"):
        find_preset("smolm2-135m")
    with pytest.raises(
        ConfigError, match=r"zzz: no such folder here, and .* known are smollm2-135m-instruct and .*README"
    ):
        find_preset("zzzzzzzzzzzzzzz")
    with pytest.raises(ConfigError, match=r"^models/mine/: no such folder here$"):
        find_preset("models/mine/")
    assert match_preset("gpt2") is None


def test_ziya_is_announced_as_a_difference() -> None:
    preset = find_preset("idea-ccnl/ziya-llama-13b-v1")
    assert preset.config.vocab_size == 39424
    assert "differences" in preset.note


def test_tiny_random_llama_is_deterministic() -> None:
    preset = PRESETS[TINY_RANDOM_LLAMA]
    config = preset.config
    shape = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert shape == (2048, 64, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert preset.seed is not None
    states = []
    for _ in range(2):
        model = LlamaForCausalLM(config)
        model.init_weights(preset.seed)
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
