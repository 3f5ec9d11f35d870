"""Adapters on some layers only, as PEFT says it: its numbers, in every way that they are read here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from arriero.adapters.lora import apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.errors import FormatError
from arriero.formats import hf
from arriero.formats.peft import load_adapter

Run = Callable[..., subprocess.CompletedProcess[str]]
IDS = torch.arange(24)[None] * 7 % 61
ALL = ["q_proj", "v_proj", "down_proj"]
CHOICES: dict[str, dict[str, Any]] = {
    "one": {"layers_to_transform": [1]},
    "a number": {"layers_to_transform": 0},
    "no number": {"layers_to_transform": []},
    "a pattern": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "patterns": {"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "excluded by expression": {"exclude_modules": r".*layers\.[02]\..*(q|v)_proj"},
    "both": {"layers_to_transform": [0, 1], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "expression": {"target_modules": r".*(q_proj|up_proj)", "exclude_modules": ["model.layers.2.mlp.up_proj"]},
    "DoRA": {"layers_to_transform": [1], "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def original(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def adapter(base: Path, folder: Path, **changes: Any) -> torch.Tensor:
    """Logits (S, V) of peft, which writes the adapter."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, "target_modules": ALL} | changes)
    model = get_peft_model(original(base), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    logits: torch.Tensor = model.eval()(IDS).logits[0]
    return logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@torch.no_grad()
def test_numbers_are_pefts(tmp_path: Path, base: Path, choice: dict[str, Any]) -> None:
    wanted = adapter(base, tmp_path / "a", **choice)
    config, state = load_adapter(tmp_path / "a")
    model = hf.load_model(base)
    apply_lora(model, from_peft(config), fresh=False)
    load_adapter_state(model, state)
    close(model.eval()(IDS)[0], wanted)


@pytest.mark.parametrize("to", ["hf", "gguf", "paddle"])
@pytest.mark.parametrize("name", ["one", "a number", "excluded by expression"])
@torch.no_grad()
def test_conversions_and_back_are_pefts(tmp_path: Path, base: Path, in_process: Run, name: str, to: str) -> None:
    wanted = adapter(base, tmp_path / "a", **CHOICES[name])
    output, back = tmp_path / ("b.gguf" if to == "gguf" else "b"), tmp_path / "c"
    options = ["--to", to, "--base_model", str(base), *(["--dtype", "float32"] if to == "hf" else [])]
    told = in_process("convert", str(tmp_path / "a"), str(output), *options)
    assert told.returncode == 0, told.stderr
    if to == "hf":
        back = output
    else:
        told = in_process("convert", str(output), str(back))
        assert told.returncode == 0, told.stderr
    close(PeftModel.from_pretrained(original(base), back).eval()(IDS).logits[0], wanted)
    told = in_process(
        "merge", "--model_name_or_path", str(base), "--lora_path", str(back), "--output_path", str(tmp_path / "m"),
        "--device", "cpu",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    close(original(tmp_path / "m")(IDS).logits[0], wanted)


@torch.no_grad()
def test_an_adapter_of_the_head_leaves_the_copy_of_the_base(tmp_path: Path, base: Path, in_process: Run) -> None:
    wanted = adapter(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    told = in_process("convert", str(tmp_path / "a"), str(tmp_path / "b.gguf"), "--base_model", str(base))
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stderr.splitlines() if "left out" in line]
    assert "lm_head.weight" in line
    assert in_process("convert", str(tmp_path / "b.gguf"), str(tmp_path / "c")).returncode == 0
    close(PeftModel.from_pretrained(original(base), tmp_path / "c").eval()(IDS).logits[0], wanted)


def test_what_peft_would_leave_out_is_refused(tmp_path: Path, base: Path) -> None:
    adapter(base, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change in ({"layers_to_transform": [0, 1]}, {"exclude_modules": ["v_proj"]}):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values | change))
        with pytest.raises(FormatError, match="leave out"):
            load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules"),
        ({"exclude_modules": [1]}, "exclude_modules"),
    ],
)
def test_values_that_none_has(tmp_path: Path, base: Path, change: dict[str, Any], words: str) -> None:
    adapter(base, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(FormatError, match=words):
        load_adapter(tmp_path / "a")


def test_a_stored_layer_without_its_pair_is_found(tmp_path: Path, base: Path) -> None:
    adapter(base, tmp_path / "a", layers_to_transform=[1])
    path = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(path)
    del state["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(state, path)
    with pytest.raises(FormatError, match="no lora_B"):
        load_adapter(tmp_path / "a")
