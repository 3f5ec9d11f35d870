"""Comparing a converted model with its original: what is equal, what is rounded, what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.errors import FormatError
from arriero.formats.source import ModelSource
from arriero.formats.verification import Comparison, compare, prompt_logits, relative_difference, same_numbers
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source() -> ModelSource:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    state = {name: torch.randn_like(tensor) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    return ModelSource(Path("original"), "hf", config, state)


def changed(source: ModelSource, change: float) -> ModelSource:
    tensor = source.tensors[NAME]
    assert isinstance(tensor, torch.Tensor)
    new = tensor.clone()
    new[0, 0] += change
    return replace(source, path=Path("written"), tensors={**source.tensors, NAME: new})


def check(source: ModelSource, written: ModelSource, **how: Any) -> Comparison:
    return compare(source, written, **{"dtype": None, "lossy": False, "logits": True} | how)


def test_equal(source: ModelSource) -> None:
    result = check(source, replace(source))
    assert (result.tensors, result.rounded, result.largest) == (len(source.tensors), 0, 0.0)
    assert result.logits is not None
    assert result.logits[0] == 0.0
    assert str(result).startswith(
        f"all {len(source.tensors)} tensors equal; logits of a prompt differ by at most 0.0e+00"
    )


def test_a_changed_number(source: ModelSource) -> None:
    with pytest.raises(FormatError, match=rf"written: {NAME} differs from the original: nothing was kept"):
        check(source, changed(source, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded(source: ModelSource, dtype: torch.dtype) -> None:
    written = replace(source, tensors={name: tensor.to(dtype) for name, tensor in source.tensors.items()})  # type: ignore[union-attr]
    result = check(source, written, dtype=dtype)
    assert result.rounded == result.tensors
    assert 0 < result.largest < torch.finfo(dtype).eps
    with pytest.raises(FormatError, match="differs from the original"):
        check(source, written)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(FormatError, match=f"rounded to {str(other).removeprefix('torch.')}"):
        check(source, written, dtype=other)


def test_told_and_not_judged(source: ModelSource) -> None:
    result = check(source, changed(source, 0.5), lossy=True)
    tensor = source.tensors[NAME]
    assert isinstance(tensor, torch.Tensor)
    assert (result.rounded, result.worst) == (1, NAME)
    assert result.largest == pytest.approx(0.5 / float(tensor.double().norm()), rel=1e-6)
    assert math.isinf(check(source, changed(source, math.inf), lossy=True, logits=False).largest)


def test_names_and_shapes(source: ModelSource) -> None:
    rest = {name: tensor for name, tensor in source.tensors.items() if name != NAME}
    with pytest.raises(FormatError, match=f"{NAME} is in only one"):
        check(source, replace(source, tensors=rest))
    with pytest.raises(FormatError, match=f"{NAME} has the shape"):
        check(source, replace(source, tensors={**rest, NAME: torch.zeros(24, 16)}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 1e-5, "rms_norm_eps is 1e-05, the original's is 1e-06"),
        ("rope_theta", 500000.0, "rope_theta 500000"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "RoPE is .*linear"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "RoPE is .*dynamic"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
    ],
)
def test_another_configuration(source: ModelSource, key: str, value: Any, message: str) -> None:
    other = replace(source.config, **{key: value})
    with pytest.raises(FormatError, match=message):
        check(source, replace(source, config=other))


def test_what_files_cannot_say_does_not_matter(source: ModelSource) -> None:
    """GGUF has fp32 constants; a context length is a promise and no part of the computation."""
    eps = float(torch.tensor(1e-6, dtype=torch.float32))
    assert eps != 1e-6
    check(source, replace(source, config=replace(source.config, rms_norm_eps=eps, max_position_embeddings=77)))


def test_the_logits_are_the_models(source: ModelSource) -> None:
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(dict(source.tensors))
    ids = torch.tensor([[i * 7919 % 40 for i in range(32)]])
    with torch.no_grad():
        torch.testing.assert_close(prompt_logits(source), model.eval()(ids)[0], atol=1e-4, rtol=1e-5)


def test_same_numbers() -> None:
    nan = float("nan")
    one = torch.tensor([1.0, nan, 0.0])
    assert same_numbers(one, one.clone())
    assert same_numbers(one, one.bfloat16())
    assert same_numbers(one.half(), one.bfloat16())
    assert not same_numbers(one, torch.tensor([1.0, nan, -0.0]))
    assert not same_numbers(one, torch.tensor([1.0, 0.0, 0.0]).double())
    assert not same_numbers(torch.tensor([1.0 + 2**-20]), torch.tensor([1.0]).bfloat16())
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
