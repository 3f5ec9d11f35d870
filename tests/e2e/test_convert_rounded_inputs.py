"""`arriero convert` of a model whose layers round their inputs: no other format does, which is told and measured."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llama import save_with_tokenizer

from arriero.formats import hf
from arriero.formats.verification import PROMPT_TOKENS
from arriero.models.config import LlamaConfig

transformers = pytest.importorskip("transformers")

Run = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = LlamaConfig(
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(CONFIG, tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("output", ["hf", "model.gguf"])
@pytest.mark.parametrize(("kind", "rounds"), [("a8w8", True), ("int8", False)])
def test_it_is_told_and_measured(
    base: Path, tmp_path: Path, in_process: Run, kind: str, rounds: bool, output: str
) -> None:
    folder = tmp_path / "q"
    told = in_process("quantize", str(base), "--output_path", str(folder), "--quant_type", kind)
    assert told.returncode == 0, told.stderr
    told = in_process("convert", str(folder), str(tmp_path / output))
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stderr.splitlines() if "round their inputs to 8 bits" in line]
    assert [line.strip().startswith("warning: its layers round") for line in lines] == [True] * rounds
    match = re.search(r"logits of a prompt differ by at most (\S+), largest", told.stderr)
    assert match is not None
    if not rounds:
        assert float(match[1]) <= 1e-5
        return
    plain = in_process("convert", str(tmp_path / output), str(tmp_path / "plain")) if output != "hf" else None
    assert plain is None or plain.returncode == 0
    place = tmp_path / ("hf" if plain is None else "plain")
    ids = torch.arange(PROMPT_TOKENS)[None] * 7919 % CONFIG.vocab_size
    with torch.no_grad():
        other = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits
        difference = float((hf.load_model(folder)(ids) - other).abs().max())
    assert difference > 1e-3
    assert math.isclose(float(match[1]), difference, rel_tol=0.05)


def test_other_differences_are_still_refused(
    base: Path, tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are judged as ever."""
    folder = tmp_path / "q"
    in_process("quantize", str(base), "--output_path", str(folder), "--quant_type", "a8w8")
    save = hf.save_model

    def wrong(state: dict[str, torch.Tensor], *more: object, **named: object) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        save({**state, name: state[name].load() * 1.01}, *more, **named)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr("arriero.formats.hf_source.save_model", wrong)
    told = in_process("convert", str(folder), str(tmp_path / "hf"))
    assert told.returncode == 2
    assert "up_proj.weight differs from the original: nothing was kept" in told.stderr
    assert not (tmp_path / "hf").exists()
