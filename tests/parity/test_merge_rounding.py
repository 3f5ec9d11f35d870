"""Merging where rounding is large: what peft merges alike is accepted, and what is another model is not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from arriero.errors import FormatError
from arriero.formats import hf
from arriero.training.merge_check import rounding_noise
from arriero.training.merging import _compare

Run = Callable[..., subprocess.CompletedProcess[str]]
PROMPT = torch.arange(40)[None] * 7919 % 199


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base without a tokenizer whose numbers amplify rounding, and an adapter of it, both by their own libraries."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=1.0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged


def test_rounding_beyond_1e_5_of_the_logits_is_no_other_model(
    tmp_path: Path, parts: tuple[Path, Path], in_process: Run
) -> None:
    base, adapter = parts
    told = in_process(
        "merge", "--model_name_or_path", str(base), "--lora_path", str(adapter), "--output_path", str(tmp_path / "out"),
        "--device", "cpu",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr  # without a tokenizer too, as it encodes nothing
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    wanted = merged_by_peft(base, adapter)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def test_the_bound_is_a_few_roundings_and_finds_another_model(parts: tuple[Path, Path]) -> None:
    base, _ = parts
    model = hf.load_model(base)
    before = model(PROMPT).float()
    exact = hf.load_model(base, dtype="float64")(PROMPT)
    rounding = float((before - exact).abs().max())
    noise = rounding_noise(model, PROMPT)
    assert noise / 8 < rounding < noise * 8  # what fp64 says of fp32
    assert rounding > 1e-5 * float(before.abs().max())  # so that this model tests the bound
    assert torch.equal(model(PROMPT), before)  # no hook is left
    _compare(before, model, PROMPT, base)
    model.model.layers[2].mlp.up_proj.weight.mul_(1 + 1e-3)  # one layer of 56, off by 1e-3
    with pytest.raises(FormatError, match="differ by"):
        _compare(before, model, PROMPT, base)
