"""Adapters through `arriero convert`: PEFT, PaddleNLP and GGUF, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.adapters.prefix_files import BOTH, flatten, parameter_name
from arriero.cli import main
from arriero.engine.adapter_conversion import _compare_lora
from arriero.errors import FormatError
from arriero.formats.detection import detect
from arriero.formats.download import resolve_model
from arriero.formats.peft import PeftLoraConfig, load_adapter, of_pattern, save_adapter
from arriero.formats.peft_prefix import PeftPrefixConfig, open_embeddings, save_prefix
from arriero.formats.peft_prefix import read_config as read_prefix_config

Convert = Callable[..., str]
RANK = 4
TARGETS = {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random-llama", tmp_path_factory.mktemp("home"))


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    def call(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["convert", *map(str, arguments)]) == code, capsys.readouterr().err
        return capsys.readouterr().err

    return call


@pytest.fixture
def lora(tmp_path: Path, tiny: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for layer in range(2):
        for target, (out, width) in TARGETS.items():
            name = f"model.layers.{layer}.self_attn.{target}"
            state[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    config = PeftLoraConfig(RANK, 12, target_modules=tuple(sorted(TARGETS)), base_model_name_or_path=str(tiny))
    save_adapter(tmp_path / "peft", state, config)
    return tmp_path / "peft"


def check_lora(folder: Path, original: Path) -> None:
    (config, state), (wanted_config, wanted) = load_adapter(folder), load_adapter(original)
    assert (config.r, config.lora_alpha) == (wanted_config.r, wanted_config.lora_alpha)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


@pytest.mark.parametrize("more", [[], ["--tensor_parallel_degree", "2"]])
def test_lora_through_paddle(lora: Path, tmp_path: Path, convert: Convert, more: list[str]) -> None:
    said = convert(lora, tmp_path / "paddle", "--to", "paddle", *more)
    assert "PEFT LoRA adapter, rank 4; all 12 tensors equal" in said
    assert len(list((tmp_path / "paddle").glob("lora_model_state*.pdparams"))) == (2 if more else 1)
    convert(tmp_path / "paddle", tmp_path / "back")
    check_lora(tmp_path / "back", lora)


def test_lora_through_gguf(lora: Path, tiny: Path, tmp_path: Path, convert: Convert) -> None:
    convert(lora, tmp_path / "lora.gguf")
    convert(tmp_path / "lora.gguf", tmp_path / "back", "--base_model", tiny)
    check_lora(tmp_path / "back", lora)
    convert(tmp_path / "lora.gguf", tmp_path / "paddle", "--to", "paddle", "--base_model", tiny)
    convert(tmp_path / "paddle", tmp_path / "again", "--to", "peft")
    check_lora(tmp_path / "again", lora)


@pytest.mark.parametrize("more", [[], ["--tensor_parallel_degree", "2"]])
def test_prefix_through_paddle(tiny: Path, tmp_path: Path, convert: Convert, more: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        parameter_name(layer, which): torch.randn(6, 32, generator=generator) for layer in range(2) for which in BOTH
    }
    config = PeftPrefixConfig(6, 32, 2, 2, base_model_name_or_path=str(tiny))
    save_prefix(tmp_path / "peft", state, config, lambda parameters: flatten(parameters, 2))
    said = convert(tmp_path / "peft", tmp_path / "paddle", "--to", "paddle", *more)
    assert "6 tokens; all 4 tensors equal to " in said
    assert len(list((tmp_path / "paddle").glob("prefix_model_state*.pdparams"))) == (2 if more else 1)
    assert "add --base_model" in convert(tmp_path / "paddle", tmp_path / "back", code=2)
    convert(tmp_path / "paddle", tmp_path / "back", "--base_model", tiny)
    found = read_prefix_config(tmp_path / "back")
    before, after = (open_embeddings(tmp_path / name, found).read("prompt_embeddings") for name in ("peft", "back"))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
    values = [found.columns(layer, "value") for layer in range(2)]  # only keys are turned
    assert all(torch.equal(after[:, columns], before[:, columns]) for columns in values)
    if more:
        convert(tmp_path / "paddle", tmp_path / "joined", "--to", "paddle", "--base_model", tiny)
        assert len(list((tmp_path / "joined").glob("prefix_model_state*.pdparams"))) == 1
        convert(tmp_path / "peft", tmp_path / "half", "--dtype", "bfloat16")
        half = open_embeddings(tmp_path / "half", found).read("prompt_embeddings")
        assert torch.equal(half, before.bfloat16())


def test_refusals(lora: Path, tiny: Path, tmp_path: Path, convert: Convert) -> None:
    out = tmp_path / "out"
    assert "is a PEFT LoRA adapter already; say --to" in convert(lora, out, code=2)
    assert "Meta's format has no adapters" in convert(lora, out, "--to", "meta", code=2)
    values = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": None}))
    assert "does not name the model it is for; add --base_model" in convert(lora, out, "--to", "paddle", code=2)
    (lora / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "/nowhere/at/all"}))
    assert "add --base_model" in convert(lora, out, "--to", "paddle", code=2)
    assert "no such f" in convert(lora, out, "--to", "paddle", "--base_model", "/nowhere/at/all", code=2)
    (lora / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "IA3"}))
    assert "peft_type 'IA3' is not read" in convert(lora, out, "--to", "paddle", code=2)
    assert not out.exists()


def test_dora_has_no_place_elsewhere(lora: Path, tmp_path: Path, convert: Convert) -> None:
    config, state = load_adapter(lora)
    lengths = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): tensor.norm(dim=1)
        for name, tensor in state.items()
        if ".lora_B." in name
    }
    save_adapter(tmp_path / "dora", state | lengths, replace(config, use_dora=True))
    for target, to in ((tmp_path / "x.gguf", "gguf"), (tmp_path / "out", "paddle")):
        assert "merge it into" in convert(tmp_path / "dora", target, "--to", to, code=2)
        assert not target.exists()


def changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each layer's weight, by PEFT's rules."""
    config, state = load_adapter(folder)
    found = {}
    for name in state:
        if not name.endswith(".lora_B.weight"):
            continue
        layer = name.removesuffix(".lora_B.weight")
        rank, alpha = config.rank_of(layer), of_pattern(config.alpha_pattern, layer, config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        found[layer] = scale * (state[name].double() @ state[f"{layer}.lora_A.weight"].double())
    return found


@pytest.mark.parametrize(
    "how",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 6}},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 6}},
        {"rank_pattern": {"k_proj": 2}, "use_rslora": True},
    ],
)
def test_own_scales_through_gguf(how: dict[str, Any], lora: Path, tiny: Path, tmp_path: Path, convert: Convert) -> None:
    config, state = load_adapter(lora)
    if "rank_pattern" in how:
        cut = {name: tensor[:2] if "lora_A" in name else tensor[:, :2] for name, tensor in state.items()}
        state |= {name: tensor.contiguous() for name, tensor in cut.items() if "k_proj" in name}
    save_adapter(tmp_path / "own", state, replace(config, **how))
    said = convert(tmp_path / "own", tmp_path / "own.gguf")
    assert "with another scale but the same product" in said
    convert(tmp_path / "own.gguf", tmp_path / "back", "--base_model", tiny)
    before, after = changes(tmp_path / "own"), changes(tmp_path / "back")
    assert before.keys() == after.keys()
    for layer, change in before.items():
        torch.testing.assert_close(after[layer], change, rtol=0, atol=1e-6 * float(change.abs().max()))


def test_a_wrong_product_is_refused(lora: Path, tmp_path: Path) -> None:
    config, state = load_adapter(lora)
    stretched = replace(config, use_rslora=True)  # twice as strong
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in state.items()}
    _compare_lora((config, state), (stretched, halved), tmp_path)
    with pytest.raises(FormatError, match="times its scale differs"):
        _compare_lora((config, state), (stretched, state), tmp_path)
    name = next(name for name in halved if "lora_B" in name)
    with pytest.raises(FormatError, match="times its scale differs"):
        _compare_lora((config, state), (stretched, halved | {name: halved[name] * (1 + 1e-5)}), tmp_path)


def test_within_a_format_where_something_changes(lora: Path, tmp_path: Path, convert: Convert) -> None:
    convert(lora, tmp_path / "half", "--dtype", "bfloat16")
    _, state = load_adapter(tmp_path / "half")
    assert all(torch.equal(tensor, load_adapter(lora)[1][name].bfloat16()) for name, tensor in state.items())
    convert(lora, tmp_path / "parts", "--to", "paddle", "--tensor_parallel_degree", 2)
    convert(tmp_path / "parts", tmp_path / "joined", "--to", "paddle")
    assert len(list((tmp_path / "joined").glob("lora_model_state*.pdparams"))) == 1
    convert(tmp_path / "joined", tmp_path / "back")
    check_lora(tmp_path / "back", lora)
    assert "already" in convert(tmp_path / "joined", tmp_path / "again", "--to", "paddle", code=2)


@pytest.mark.parametrize("to", ["hf", "paddle"])
def test_an_adapter_takes_the_place_of_a_model(
    to: str, lora: Path, tiny: Path, tmp_path: Path, convert: Convert
) -> None:
    convert(tiny, tmp_path / "out", "--to", to, "--verify", "no")
    if to == "hf":
        convert(lora, tmp_path / "paddle", "--to", "paddle")
        lora = tmp_path / "paddle"
    assert "holds a model already" in convert(lora, tmp_path / "out", "--to", to, code=2)
    convert(lora, tmp_path / "out", "--to", to, "--overwrite_output_dir")
    assert detect(tmp_path / "out").kind == {"hf": "peft-lora", "paddle": "paddle-lora"}[to]
    convert(tiny, tmp_path / "out", "--to", to, "--overwrite_output_dir")
    assert detect(tmp_path / "out").kind == to
