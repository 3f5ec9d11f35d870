"""`arriero merge` into another type: every weight is the exact sum rounded once, whatever the base is stored in."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_adapter import write_adapter
from safetensors.torch import load_file, save_file
from tiny_llama import save_with_tokenizer
from torch import Tensor

from arriero.adapters.lora import LoRAConfig
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.loading import load_for_inference
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.quantization.nf4 import LEVELS

Run = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))
SCALING = 2.0
SIZES = LlamaConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32; nf4's blocks fit its layers."""
    return save_with_tokenizer(SIZES, tmp_path_factory.mktemp("base") / "model")


def merged(run: Run, base: Path, adapter: Path, output: Path, *more: str) -> tuple[dict[str, Tensor], str]:
    arguments = ["--model_name_or_path", str(base), "--lora_path", str(adapter), "--output_path", str(output)]
    told = run("merge", *arguments, "--device", "cpu", *more)
    assert told.returncode == 0, told.stderr
    return load_file(output / "model.safetensors"), told.stdout


def updates(adapter: Path) -> dict[str, Tensor]:
    """``s B A`` by the names of the weights, in fp64."""
    state = {name.removeprefix("base_model.model."): value.double() for name, value in _state(adapter).items()}
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        f"{layer}.weight": SCALING * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        for layer in layers
    }


def _state(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def check_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Half a unit in the last of bfloat16's 8 bits is the most that one rounding of an fp64 number changes."""
    assert found.dtype == torch.bfloat16
    half = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 8)
    beyond = (found.double() - exact).abs() > half * (1 + 1e-3)  # fp32's own rounding of the sum
    assert not beyond.any(), f"{int(beyond.sum())} of {beyond.numel()}"


def test_a_base_in_float32(tiny: Path, tmp_path: Path, in_process: Run) -> None:
    write_adapter(tiny, tmp_path / "a", CONFIG)
    found, told = merged(in_process, tiny, tmp_path / "a", tmp_path / "m", "--dtype", "bfloat16")
    assert "every weight is their sum rounded to bfloat16, checked bit by bit" in told
    base, changes = load_file(tiny / "model.safetensors"), updates(tmp_path / "a")
    assert len(changes) == 2 * json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    assert found.keys() == base.keys()
    for name, weight in base.items():
        if name in changes:
            check_rounded_once(found[name], weight.double() + changes[name])
        else:
            assert torch.equal(found[name], weight.bfloat16())
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_base_of_several_types(tiny: Path, tmp_path: Path, in_process: Run) -> None:
    """config.json says bfloat16, and one matrix is fp32: it was rounded before the sum."""
    base = tmp_path / "base"
    values = json.loads((tiny / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    weights = {name: value.bfloat16() for name, value in load_file(tiny / "model.safetensors").items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = load_file(tiny / "model.safetensors")[name]
    base.mkdir()
    (base / "config.json").write_text(json.dumps(values))
    save_file(weights, base / "model.safetensors")
    write_adapter(base, tmp_path / "a", CONFIG)
    for dtype in ("auto", "float32"):
        found, _ = merged(in_process, base, tmp_path / "a", tmp_path / dtype, "--dtype", dtype)
        exact = weights[name].double() + updates(tmp_path / "a")[name]
        if dtype == "auto":
            check_rounded_once(found[name], exact)
        else:
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-7)


def test_a_base_in_nf4(tiny: Path, tmp_path: Path, in_process: Run) -> None:
    half, base = tmp_path / "half", tmp_path / "nf4"
    hf.save_model(hf.load_model(tiny, "bfloat16"), hf.read_config(tiny), half, extra_files_from=tiny)
    told = in_process("quantize", str(half), "--output_path", str(base), "--quant_type", "nf4")
    assert told.returncode == 0, told.stderr
    write_adapter(base, tmp_path / "a", CONFIG)
    found, told_merge = merged(in_process, base, tmp_path / "a", tmp_path / "m")
    assert "warning: the base is quantized" in told_merge
    assert "rounded to bfloat16, checked bit by bit" in told_merge
    stored, changes = load_file(base / "model.safetensors"), updates(tmp_path / "a")
    for name, weight in found.items():
        if f"{name}.absmax" not in stored:
            assert torch.equal(weight, stored[name])
            continue
        packed, levels = stored[name].flatten().int(), torch.tensor(LEVELS, dtype=torch.float64)
        numbers = levels[torch.stack((packed >> 4, packed & 15), 1)].view(-1, 64)
        exact = (numbers * stored[f"{name}.absmax"].double()[:, None]).view(weight.shape)
        check_rounded_once(weight, exact + changes.get(name, 0.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_rounds_its_inputs(tiny: Path, tmp_path: Path, in_process: Run, dtype: str) -> None:
    base = tmp_path / "a8w8"
    told = in_process("quantize", str(tiny), "--output_path", str(base), "--quant_type", "a8w8")
    assert told.returncode == 0, told.stderr
    write_adapter(base, tmp_path / "a", CONFIG)
    _, told_merge = merged(in_process, base, tmp_path / "a", tmp_path / "m", "--dtype", dtype)
    assert "warning: the layers of the base round their inputs to 8 bits; the merged model does not" in told_merge
    match = re.search(r"logits differ from base \+ adapter by at most (\S+), largest", told_merge)
    assert match is not None
    # base and adapter as they are answered with: on a quantized base an adapter stays apart
    options = ModelOptions(model_name_or_path=str(base), device="cpu")
    apart = load_for_inference(options, AdapterPathOptions(lora_path=str(tmp_path / "a"))).model
    vocabulary = apart.config.vocab_size
    ids = torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        written = hf.load_model(tmp_path / "m")
        difference = float((apart(ids) - written(ids).float()).abs().max())
    assert difference > 1e-4  # rounding the inputs matters here
    assert math.isclose(float(match[1]), difference, rel_tol=0.05)


def test_a_weight_that_the_type_cannot_hold(tiny: Path, tmp_path: Path, in_process: Run) -> None:
    base = tmp_path / "base"
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    base.mkdir()
    (base / "config.json").write_text((tiny / "config.json").read_text())
    save_file(weights, base / "model.safetensors")
    write_adapter(base, tmp_path / "a", CONFIG)
    arguments = ["--lora_path", str(tmp_path / "a"), "--output_path", str(tmp_path / "m"), "--dtype", "float16"]
    told = in_process("merge", "--model_name_or_path", str(base), *arguments)
    assert told.returncode == 2
    assert "model.norm.weight has numbers that are not finite as float16: take --dtype float32" in told.stderr
    assert not (tmp_path / "m").exists()
