"""What a conversion must not do in silence: numbers that become infinite."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.formats.download import resolve_model
from arriero.formats.peft import PeftLoraConfig, save_adapter
from arriero.models.presets import TINY_RANDOM_LLAMA

Run = Callable[..., subprocess.CompletedProcess[str]]
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(TINY_RANDOM_LLAMA), folder)
    return folder


def with_number(folder: Path, number: float, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    state[NORM][3] = number
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("verify", ["true", "false"])
@pytest.mark.parametrize(
    "options",
    [
        ["--to", "hf"],
        ["--to", "hf", "--tensor_parallel_degree", "2"],
        ["--to", "paddle"],
        ["--to", "paddle", "--tensor_parallel_degree", "2"],
        ["--to", "meta"],
    ],
    ids=" ".join,
)
def test_a_number_that_becomes_infinite_is_refused(
    tmp_path: Path, model: Path, in_process: Run, options: list[str], verify: str
) -> None:
    with_number(model, 1e5, torch.float32)
    told = in_process("convert", str(model), str(tmp_path / "out"), "--dtype", "float16", *options, "--verify", verify)
    assert told.returncode == 2
    assert "layers.1." in told.stderr
    assert "65504" in told.stderr
    assert told.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [65504.0, 65519.0, -65519.0, float("inf"), float("nan")])
def test_what_has_a_finite_value_there_or_was_none_is_kept(
    tmp_path: Path, model: Path, in_process: Run, number: float
) -> None:
    with_number(model, number, torch.float32)
    told = in_process("convert", str(model), str(tmp_path / "out"), "--dtype", "float16")
    assert told.returncode in (0, 2)
    if told.returncode == 2:  # logits of a model with an infinite weight are no numbers: not this test's matter
        assert "65504" not in told.stderr
        return
    wanted = torch.tensor(number).to(torch.float16)
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[NORM][3].view(torch.int16), wanted.view(torch.int16)
    )


def test_fp64_beyond_the_range_of_fp32_and_bf16(tmp_path: Path, model: Path, in_process: Run) -> None:
    with_number(model, 1e39, torch.float64)
    for dtype in ("float32", "bfloat16"):
        told = in_process("convert", str(model), str(tmp_path / "out"), "--dtype", dtype)
        assert told.returncode == 2
        assert NORM in told.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "paddle"])
def test_of_an_adapter_too(tmp_path: Path, model: Path, in_process: Run, to: str) -> None:
    values = json.loads((model / "config.json").read_text())
    width, layer = values["hidden_size"], "model.layers.0.self_attn.q_proj"
    out = values["num_attention_heads"] * values.get("head_dim", width // values["num_attention_heads"])
    state = {f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(out, 2)}
    state[f"{layer}.lora_B.weight"][1, 1] = 7e4
    save_adapter(tmp_path / "adapter", state, PeftLoraConfig(r=2, target_modules=("q_proj",)))
    told = in_process(
        "convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", to, "--dtype", "float16",
        "--base_model", str(model),
    )  # fmt: skip
    assert told.returncode == 2
    assert f"{layer}.lora_B.weight" in told.stderr
    assert not (tmp_path / "out").exists()
