"""Weights so small that the type of the scales has no number for theirs: rows of a model in float16, most of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.integers import IntegerScheme, absmax_scales, dequantize
from arriero.quantization.integers import quantize as to_integers
from arriero.quantization.post_training import quantize_model
from arriero.quantization.rounding import gptq, searched_scales
from arriero.quantization.schemes import Fp8Weights, IntegerWeights, WeightScheme
from arriero.training.quantizing import save_quantized

SMALLEST = 2.0**-24  # in float16
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("scheme", "greatest"),
    [
        (Fp8Weights(torch.float16), 1e-5),
        (IntegerWeights(IntegerScheme(8), torch.float16), 3e-6),
        (IntegerWeights(IntegerScheme(4, 32), torch.float16), 1e-7),
    ],
    ids=["fp8", "int8", "int4"],
)
def test_a_scale_that_would_be_zero_is_the_smallest_number(scheme: WeightScheme, greatest: float) -> None:
    weight = random(4, 64).mul_(0.02)
    weight[1] = weight[1] / weight[1].abs().max() * greatest
    weight[2] = 0
    stored = scheme.quantize(weight)
    assert float(stored["weight_scale"][1].float().max()) == SMALLEST
    found = scheme.dequantize(stored)
    # the nearest of the multiples there are, by the formula in fp64; the mantissa of fp8 has 4 bits
    steps = weight[1].double() / SMALLEST
    if isinstance(scheme, IntegerWeights):
        expected = steps.round().clamp(scheme.integer.low, scheme.integer.high) * SMALLEST
        assert torch.equal(found[1].double(), expected)
    else:
        torch.testing.assert_close(found[1].double(), weight[1].double(), rtol=2**-4, atol=SMALLEST * 2**-10)
    assert not found[2].any()
    assert torch.isfinite(found).all()
    whole = scheme.quantize(weight[:1])  # other rows do not notice
    assert all(torch.equal(tensor[:1].float(), whole[name].float()) for name, tensor in stored.items())


def test_weights_that_fp32_hardly_holds() -> None:
    scheme = IntegerScheme(4)
    weight = torch.tensor([[1e-44, -3e-45, 0.0, 1e-45]])
    scales = absmax_scales(weight, scheme)
    assert float(scales) == torch.finfo(torch.float32).smallest_normal
    assert to_integers(weight, scales, scheme).tolist() == [[0, 0, 0, 0]]


def test_gptq_of_a_group_next_to_nothing() -> None:
    """The same integers elsewhere as where that group is zero; they were lost, row and all."""
    scheme = IntegerScheme(4, 64)
    weight = random(2, 128).mul_(0.02)
    weight[0, :64] = 0
    mixed = torch.eye(128) + 0.1 * random(128, 128, seed=1)
    x = random(500, 128, seed=2) @ mixed
    x[:, 10] *= 5
    moments = x.T @ x / 500
    expected = gptq(weight, searched_scales(weight, scheme, torch.float16).float(), scheme, moments)
    weight[0, 0] = 1e-7
    scales = searched_scales(weight, scheme, torch.float16)
    assert float(scales[0, 0]) == SMALLEST
    found = gptq(weight, scales.float(), scheme, moments)
    assert torch.equal(found[0, 64:], expected[0, 64:])
    assert torch.equal(found[1], expected[1])
    assert dequantize(found, scales.float())[0, :64].abs().max() <= 8 * SMALLEST


def test_gptq_makes_no_integers_of_what_is_no_number() -> None:
    weight = random(2, 32)
    weight[1, 3] = torch.nan
    with pytest.raises(ConfigError, match="do not determine GPTQ's update"):
        gptq(weight, torch.ones(2, 1), IntegerScheme(8), torch.eye(32))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16, with a row of weights that fp8 has no scale for."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(1)
    with torch.no_grad():
        row = model.model.layers[0].mlp.gate_proj.weight[3]  # type: ignore[index, union-attr, operator]
        row.copy_(1e-5 * random(64).sign())
        row[5] = 0
    hf.save_model(model.half(), CONFIG, folder, extra_files=tiny_tokenizer_files())
    return folder


@pytest.mark.parametrize("kind", ["fp8", "int4", "int8"])
def test_the_command_keeps_such_a_row(base: Path, tmp_path: Path, kind: str) -> None:
    assert main(["quantize", str(base), "--output_path", str(tmp_path / "q"), "--quant_type", kind]) == 0
    original = load_file(base / "model.safetensors")
    for name, weight in hf.load_state(tmp_path / "q", "float32"):
        assert (weight - original[name].float()).norm() <= 0.15 * original[name].float().norm()
        if name.endswith("gate_proj.weight"):
            torch.testing.assert_close(weight[3], original[name][3].float(), rtol=0.25, atol=0)


def test_nothing_that_is_no_number_is_written(base: Path, tmp_path: Path) -> None:
    model = hf.load_model(base, torch.float32)
    model.model.norm.weight.data[2] = 1e5  # more than float16 holds
    with pytest.raises(FormatError, match=r"model\.norm\.weight would be stored as float16 .* --dtype float32"):
        save_quantized(model, Fp8Weights(torch.float16), torch.float16, base, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    for scheme in (Fp8Weights(), IntegerWeights(IntegerScheme(8))):
        broken: Any = hf.load_model(base, torch.float32)
        broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.inf
        quantize_model(broken, scheme)
        with pytest.raises(FormatError, match=r"down_proj\.weight"):
            save_quantized(broken, scheme, torch.float32, base, tmp_path / "q")
