"""`arriero quantize`: how long the pieces of text are, and in which type the output is written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_with_tokenizer

import arriero
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

Run = Callable[..., subprocess.CompletedProcess[str]]
CONTEXT = 96
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(CONFIG, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of all that the model computes."""
    found: list[int] = []
    forward = LlamaForCausalLM.forward

    def watched(self: LlamaForCausalLM, ids: torch.Tensor, *more: Any, **named: Any) -> Any:
        found.append(ids.shape[1])
        return forward(self, ids, *more, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return found


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The {n}th day, the king spoke to his men: go {n % 7} miles.\n" for n in range(300)))
    return path


@pytest.mark.parametrize(("flags", "length"), [([], CONTEXT), (["--calibration_length", "32"], 32)])
def test_pieces_fit_the_context(
    base: Path, tmp_path: Path, in_process: Run, seen: list[int], flags: list[str], length: int
) -> None:
    given = ["--data_file", str(text_file(tmp_path)), "--quant_method", "gptq", *flags]
    told = in_process("quantize", str(base), "--output_path", str(tmp_path / "q"), *given)
    assert told.returncode == 0, told.stderr
    assert set(seen) == {length}  # what perplexity is measured on
    assert f"blocks of {length} tokens" in told.stdout
    assert (f"pieces of {CONTEXT} tokens, the whole context of this model" in told.stdout) == (not flags)


def test_longer_ones_are_refused_before_the_model_is_loaded(
    base: Path, tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("arriero.training.quantizing.load", loaded)
    text = str(text_file(tmp_path))
    given = ["--data_file", text, "--calibration_length", str(CONTEXT + 1)]
    told = in_process("quantize", str(base), "--output_path", str(tmp_path / "q"), *given)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert f"--calibration_length {CONTEXT + 1} is above the model's context of {CONTEXT}" in told.stderr
    with pytest.raises(arriero.ConfigError, match="above the model's context"):
        arriero.quantize(base, tmp_path / "q", data_file=text, calibration_length=CONTEXT + 1)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_dtype_is_the_outputs(base: Path, tmp_path: Path, in_process: Run, kind: str) -> None:
    output = tmp_path / "q"
    told = in_process("quantize", str(base), "--output_path", str(output), "--quant_type", kind, "--dtype", "bfloat16")
    assert told.returncode == 0, told.stderr
    assert "embedding, norms and output head are written in bfloat16" in told.stdout
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    original, stored = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(stored[name], original[name].bfloat16())
    assert {value.dtype for name, value in stored.items() if name.endswith("weight_scale")} <= {torch.bfloat16}
    # integers are made of the weights as they were, with the scales as they are stored
    exact = dict(hf.load_state(output, "float32"))
    for name, weight in original.items():
        assert (exact[name] - weight).norm() <= (0.12 if kind == "nf4" else 0.04) * weight.norm()
