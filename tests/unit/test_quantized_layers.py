"""Quantized linear layers: what is stored, what is read back, and how rounding and scaling find it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.errors import ConfigError
from arriero.formats.parts import Placement
from arriero.formats.quantized import quantizing
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.tensor_split import cut_of
from arriero.parallel.tensor import _check_quantized
from arriero.quantization import nf4
from arriero.quantization.awq import Repeats, best_factors, fold
from arriero.quantization.choice import scheme_for
from arriero.quantization.integers import IntegerScheme, absmax_scales, dequantize, quantize
from arriero.quantization.linear import QuantizedLinear, dequantize_layers, linear_layers, quantize_layers, rounded
from arriero.quantization.post_training import quantize_model
from arriero.quantization.rounding import gptq, output_error, searched_scales
from arriero.quantization.schemes import (
    Activation,
    Fp8Weights,
    IntegerWeights,
    Nf4Weights,
    WeightScheme,
    pack_integers,
    unpack_integers,
)

SCHEMES: dict[str, WeightScheme] = {
    "int8": IntegerWeights(IntegerScheme(8)),
    "int8 groups": IntegerWeights(IntegerScheme(8, 32), torch.bfloat16),
    "int4 groups": IntegerWeights(IntegerScheme(4, 32)),
    "int4 unpacked": IntegerWeights(IntegerScheme(4), packed=False),
    "fp8": Fp8Weights(),
    "nf4": Nf4Weights(),
}
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, size: int, seed: int = 1) -> Tensor:
    """Correlated, and of magnitudes that differ thirtyfold, as those of a real layer."""
    mixed = random(tokens, size, seed=seed) @ (torch.eye(size) + 0.5 * random(size, size, seed=seed + 1) / size**0.5)
    return mixed * torch.logspace(-1, 0.5, size)[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]


def make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(replace(CONFIG, initializer_range=0.15))
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(
                    0.3 + 2 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers(bits: int) -> None:
    values = torch.arange(-(1 << bits - 1), 1 << bits - 1, dtype=torch.int8).repeat(2, 1)
    packed = pack_integers(values, bits)
    expected = [[0] * (values.shape[1] * bits // 32) for _ in range(2)]
    for row in range(2):
        for column, value in enumerate(values[row].tolist()):
            word, place = divmod(column * bits, 32)
            expected[row][word] |= (value + (1 << bits - 1)) << place
    assert (packed.long() & 0xFFFFFFFF).tolist() == expected
    assert torch.equal(unpack_integers(packed, bits), values)


@pytest.mark.parametrize("name", SCHEMES)
def test_layer_computes_with_the_weight_that_is_read_back(name: str) -> None:
    linear = nn.Linear(128, 48)
    layer = QuantizedLinear.from_linear(linear, SCHEMES[name])
    x = random(3, 5, 128).requires_grad_()
    weight = layer.dequantized()
    share = {"int8": 0.5 / 127 + 2**-8, "int4": 0.5 / 7, "fp8": 2**-4, "nf4": (1 - 0.6961928) / 2}[name.split()[0]]
    step = share * linear.weight.abs().max() + 1e-6  # half the widest gap between two levels
    assert (weight - linear.weight).abs().max() < step
    y, expected = layer(x), F.linear(x, weight, linear.bias)
    assert torch.equal(y, expected)
    gradient = random(*y.shape, seed=2)
    found = torch.autograd.grad((y * gradient).sum(), (x, linear.bias))
    wanted = torch.autograd.grad((expected * gradient).sum(), (x, linear.bias))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_tensors_keep_their_types_and_are_frozen(name: str) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), SCHEMES[name])
    before = {key: tensor.clone() for key, tensor in layer.stored().items()}
    layer.to(torch.float16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    for key, tensor in layer.stored().items():
        assert tensor.dtype == before[key].dtype
        assert not tensor.requires_grad
        assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8))
    expected = SCHEMES[name].tensors(32, 64)
    assert {key: (tuple(t.shape), t.dtype) for key, t in layer.stored().items()} == expected


def test_backward_keeps_no_weight() -> None:
    """F.linear would keep the whole weight of every layer until its backward pass."""
    layer = QuantizedLinear.from_linear(nn.Linear(256, 256, bias=False), SCHEMES["int4 groups"])
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(random(2, 256).requires_grad_())
    assert sum(kept) == 256 * 256 // 2 + 256 * 8 * 4


def test_rows_and_runs_of_columns_are_layers_of_their_own() -> None:
    """What sharding and tensor parallelism rest on."""
    weight = random(32, 128)
    for scheme in SCHEMES.values():
        stored, whole = scheme.quantize(weight), scheme.dequantize(scheme.quantize(weight))
        rows = {name: tensor[8:16] for name, tensor in stored.items()}
        assert torch.equal(scheme.dequantize(rows), whole[8:16])
        assert 64 % scheme.column_unit == 0
        columns = {
            name: tensor if tensor.shape[1] == 1 else tensor[:, tensor.shape[1] // 2 :]
            for name, tensor in stored.items()
        }
        assert torch.equal(scheme.dequantize(columns), whole[:, 64:])


def test_rounded_activations() -> None:
    x = torch.tensor([[0.3, -1.0, 12.7, 200.0]])
    y, inside = rounded(x, torch.tensor([0.1]))
    torch.testing.assert_close(y, torch.tensor([[0.3, -1.0, 12.7, 12.7]]))
    assert inside is not None
    assert inside.tolist() == [[True, True, True, False]]
    y, inside = rounded(torch.tensor([[0.0, 0.0], [127.5, -1.0]]), None)
    assert y.tolist() == [[0.0, 0.0], [127.0, -1.0]]
    assert inside is None


def test_gradient_stops_where_activations_are_clipped() -> None:
    scheme = IntegerWeights(IntegerScheme(8), activation=Activation(), packed=False)
    linear = nn.Linear(8, 4)
    stored = scheme.quantize(linear.weight) | {"input_scale": torch.tensor([0.01])}
    layer = QuantizedLinear.from_linear(linear, scheme, stored)
    x = torch.full((1, 8), 0.5).index_fill_(1, torch.tensor([3]), 9.0).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    expected = layer.dequantized().sum(0).index_fill(0, torch.tensor([3]), 0.0)
    torch.testing.assert_close(x.grad[0], expected)


def test_searched_range_has_the_least_error_of_all_shares() -> None:
    weight, scheme = random(16, 64), IntegerScheme(4, 32)
    weight[:, 5] *= 6  # outliers, for which clipping pays
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1))
    for factor in (None, importance):
        scales = searched_scales(weight, scheme, torch.float32, factor)
        weights = torch.ones(64) if factor is None else factor

        def error(scales: Tensor, weights: Tensor = weights) -> np.ndarray:
            difference = (dequantize(quantize(weight, scales, scheme), scales) - weight) ** 2 * weights
            return difference.view(16, 2, 32).sum(-1).numpy()

        full = absmax_scales(weight, scheme)
        tried = np.stack([error(full * (1 - 0.01 * step)) for step in range(51)])
        np.testing.assert_allclose(error(scales), tried.min(0), rtol=1e-5)
        assert error(scales).sum() < 0.9 * error(full).sum()


def test_zeros_stay_zeros() -> None:
    for scheme in SCHEMES.values():
        assert torch.equal(scheme.dequantize(scheme.quantize(torch.zeros(4, 64))), torch.zeros(4, 64))
    zeros = searched_scales(torch.zeros(4, 64), IntegerScheme(4, 32), torch.float32)
    assert torch.isfinite(zeros).all()


def optimal_brain_surgeon(weight: np.ndarray, scales: np.ndarray, moments: np.ndarray, group: int) -> np.ndarray:
    """Equation 2 of GPTQ, one input after the other with a fresh inverse each, row by row."""
    found = np.zeros_like(weight)
    order = list(np.argsort(-np.diag(moments), kind="stable"))
    for row in range(len(weight)):
        values = weight[row].copy()
        left = list(order)
        while left:
            inverse = np.linalg.inv(moments[np.ix_(left, left)])
            at = left[0]
            scale = scales[row, at // group]
            integer = np.clip(np.round(values[at] / scale), -8, 7)
            found[row, at] = integer
            error = (values[at] - integer * scale) / inverse[0, 0]
            values[left] -= error * inverse[0]
            left = left[1:]
    return found


def test_gptq_is_optimal_brain_surgery() -> None:
    x = inputs(400, 32).double()
    moments = x.T @ x / len(x)
    weight = random(6, 32, seed=4).double()
    scheme = IntegerScheme(4, 8)
    scales = absmax_scales(weight, scheme)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(32)
    expected = optimal_brain_surgeon(weight.numpy(), scales.numpy(), damped.numpy(), 8)
    assert np.array_equal(gptq(weight, scales, scheme, moments).numpy(), expected)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None)])
def test_gptq_keeps_outputs_better_than_rounding(bits: int, group: int | None) -> None:
    x = inputs(2000, 256)  # two blocks of columns
    moments = x.T @ x / len(x)
    weight, scheme = random(64, 256, seed=5), IntegerScheme(bits, group)
    scales = searched_scales(weight, scheme, torch.float32)
    nearest = dequantize(quantize(weight, scales, scheme), scales)
    better = dequantize(gptq(weight, scales, scheme, moments), scales)
    assert output_error(weight, better, moments) < 0.7 * output_error(weight, nearest, moments)
    direct = float(((x @ (weight - better).T) ** 2).sum(1).mean())
    assert output_error(weight, better, moments) == pytest.approx(direct, rel=1e-3)


def test_gptq_with_inputs_that_are_always_zero_and_few_tokens() -> None:
    x = inputs(10, 64)
    x[:, :5] = 0
    weight, scheme = random(8, 64), IntegerScheme(4)
    scales = absmax_scales(weight, scheme)
    found = gptq(weight, scales, scheme, x.T @ x / len(x))
    assert torch.equal(found[:, :5], quantize(weight, scales, scheme)[:, :5])
    with pytest.raises(ConfigError, match="calibration data do not determine"):
        gptq(weight, scales, scheme, torch.full((64, 64), float("nan")))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_awq_scales_cost_nothing_and_help(seed: int) -> None:
    """With two inputs much larger than the others, the case that it is made for."""
    torch.manual_seed(seed)
    before, after = nn.Linear(48, 64), nn.Linear(64, 32)
    spread = torch.ones(64).index_fill_(0, torch.tensor([7, 41]), 20.0)
    before.weight.mul_(spread[:, None])
    before.bias.mul_(spread)
    x = inputs(500, 48)
    hidden, expected = before(x), after(before(x))
    moments, scheme, weight = hidden.T @ hidden / len(hidden), IntegerScheme(4, 32), after.weight.clone()
    factors = best_factors([weight], scheme, hidden.abs().mean(0), moments, Repeats())
    columns = fold(before, [after], factors, Repeats(), torch.float32)
    torch.testing.assert_close(after(before(x)), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    plain, scaled = absmax_scales(weight, scheme), absmax_scales(after.weight, scheme)
    nearest = dequantize(quantize(weight, plain, scheme), plain)
    better = dequantize(quantize(after.weight, scaled, scheme), scaled) / columns
    assert output_error(weight, better, moments) < 0.7 * output_error(weight, nearest, moments)


def test_repeated_heads_share_their_factors() -> None:
    repeats = Repeats(times=2, size=3)
    outputs = torch.arange(6.0)  # two heads of three
    assert repeats.spread(outputs).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert torch.equal(repeats.gathered(repeats.spread(outputs)), outputs)


def test_scaled_model_computes_the_same() -> None:
    """AWQ before rounding: 16-bit steps would hide nothing here, eight bits are near the plain model."""
    from arriero.quantization import post_training

    model = make_model()
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        hidden = list(post_training._embedded(model, list(ids[:, None])))
        for layer in model.model.layers.children():
            found = post_training._statistics(layer, model, hidden, with_moments=True)  # type: ignore[arg-type]
            for group, own in zip(post_training._GROUPS, found, strict=True):
                scheme = IntegerWeights(IntegerScheme(4, 32))
                post_training._scale(layer, group, own, scheme, model.config, torch.bfloat16)  # type: ignore[arg-type]
            hidden = [post_training._run(layer, model, states) for states in hidden]  # type: ignore[arg-type]
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        norms = [layer.input_layernorm.weight for layer in model.model.layers.children()]  # type: ignore[union-attr]
        assert all(
            torch.equal(weight, weight.bfloat16().float()) for weight in norms
        )  # stored without another rounding


def test_methods_on_a_model() -> None:
    """Each method is nearer to the plain model than the one before, on text that it was not calibrated on."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randint(64, (1, 48), generator=generator) for _ in range(24)]
    ids = torch.randint(64, (4, 48), generator=generator)
    scheme = IntegerWeights(IntegerScheme(4, 32))
    with torch.no_grad():
        expected = model(ids)
    errors = {}
    for method in ("plain", "rtn", "awq", "gptq"):
        other = copy.deepcopy(model)
        if method == "plain":
            layers = linear_layers(CONFIG)
            quantize_layers(other, lambda name, _, layers=layers: scheme if name in layers else None)
        else:
            quantize_model(other, scheme, method, blocks)
        assert {name for name, m in other.named_modules() if isinstance(m, QuantizedLinear)} == set(
            linear_layers(CONFIG)
        )
        with torch.no_grad():
            errors[method] = float((other(ids) - expected).square().mean())
            again = other(ids)
            assert len(dequantize_layers(other)) == 14
            torch.testing.assert_close(other(ids), again, rtol=1e-5, atol=1e-5)
    assert errors["gptq"] < errors["awq"] < errors["rtn"] < errors["plain"], errors


def test_static_ranges_are_the_greatest_inputs() -> None:
    model = make_model()
    blocks = [torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    scheme = IntegerWeights(IntegerScheme(8), activation=Activation(), packed=False)
    seen: list[float] = []
    first = model.model.layers.get_submodule("0")
    handle = first.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].abs().max())))  # type: ignore[union-attr]
    with torch.no_grad():
        for block in blocks:
            model(block)
    handle.remove()
    quantize_model(model, scheme, "rtn", blocks)
    stored = first.mlp.down_proj.stored()["input_scale"]  # type: ignore[union-attr, operator]
    assert float(stored) == pytest.approx(max(seen) / 127, rel=1e-5)


def test_choice_of_groups() -> None:
    assert scheme_for("int4", CONFIG) == IntegerWeights(IntegerScheme(4, 64))
    assert scheme_for("int8", CONFIG) == IntegerWeights(IntegerScheme(8))
    assert scheme_for("int4", CONFIG, group_size=-1) == IntegerWeights(IntegerScheme(4))
    assert scheme_for("nf4", CONFIG) == Nf4Weights(64)
    odd = replace(CONFIG, intermediate_size=40)
    assert scheme_for("int4", odd) == IntegerWeights(IntegerScheme(4))
    with pytest.raises(ConfigError, match="--group_size 32 does not divide the 40 inputs"):
        scheme_for("int4", odd, group_size=32)
    with pytest.raises(ConfigError, match=r"nf4 blocks of 64 do not divide .*--quantize_base int8"):
        scheme_for("nf4", odd)
    with pytest.raises(ConfigError, match="cannot be packed in 4 bits"):
        scheme_for("int4", replace(CONFIG, intermediate_size=42))
    with pytest.raises(ConfigError, match="gptq is for integers"):
        quantize_model(make_model(), Nf4Weights(), "gptq", [torch.zeros(1, 8, dtype=torch.int64)])
    with pytest.raises(ConfigError, match="give --data_file"):
        quantize_model(make_model(), IntegerWeights(IntegerScheme(4)), "awq")


def test_nf4_levels_are_the_nearest() -> None:
    weight = random(4, 128)
    packed, absmax = nf4.quantize(weight, 64)
    scaled = weight.view(4, 2, 64) / absmax[..., None]
    nearest = (scaled[..., None] - torch.tensor(nf4.LEVELS)).abs().argmin(-1)
    expected = torch.tensor(nf4.LEVELS)[nearest] * absmax[..., None]
    assert torch.equal(nf4.dequantize(packed, absmax), expected.view(4, 128))


@pytest.mark.parametrize("name", ["int8", "int4 groups", "nf4"])
def test_boxes_are_quantized_as_the_whole(name: str) -> None:
    """What a process of any layout holds of a base that is quantized while it is read."""
    whole, scheme = random(48, 128), SCHEMES[name]
    reads: list[tuple[slice, ...]] = []

    def plain(name: str, placement: Placement) -> Tensor:
        assert name == "a.q_proj.weight"
        reads.append(placement.box)
        return whole[placement.box]

    expected = scheme.quantize(whole)
    for rows in (slice(0, 48), slice(16, 32), slice(32, 48)):
        for half in (False, True):
            reads.clear()
            values = quantizing(plain, scheme, {"a.q_proj": (48, 128)})
            for part, tensor in expected.items():
                columns = (
                    slice(0, tensor.shape[1])
                    if tensor.shape[1] == 1 or not half
                    else slice(tensor.shape[1] // 2, tensor.shape[1])
                )
                box = (rows, columns)
                placement = Placement(
                    tuple(tensor.shape), (rows.start, columns.start), tuple(s.stop - s.start for s in box)
                )
                assert torch.equal(values(f"a.q_proj.{part}", placement), tensor[box])
            assert reads == [(rows, slice(0, 128))]  # once for all tensors of the layer, and no other rows


@pytest.mark.parametrize(
    ("scheme", "size", "message"),
    [
        (
            IntegerWeights(IntegerScheme(4, 64)),
            2,
            "64 inputs of model.layers.0.self_attn.o_proj, 32 each, and would cut",
        ),
        (Nf4Weights(64), 2, "quantized groups of 64"),
        (IntegerWeights(IntegerScheme(4)), 16, "quantized groups of 8"),
        (
            IntegerWeights(IntegerScheme(8), activation=Activation(dynamic=True), packed=False),
            2,
            "each token as a whole",
        ),
        (IntegerWeights(IntegerScheme(4, 32)), 2, None),
        (IntegerWeights(IntegerScheme(8)), 4, None),
        (Fp8Weights(), 4, None),
    ],
)
def test_tensor_parallelism_cuts_no_group(scheme: WeightScheme, size: int, message: str | None) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    layers = linear_layers(CONFIG)
    quantize_layers(model, lambda name, _: scheme if name in layers else None)
    if message is None:
        _check_quantized(model, size)
        return
    with pytest.raises(ConfigError, match=message):
        _check_quantized(model, size)


def test_scales_of_whole_rows_are_not_cut() -> None:
    layer = "model.layers.0.self_attn.{}_proj.{}"
    for name, shape, dim in (
        (layer.format("o", "weight_scale"), (64, 1), None),
        (layer.format("o", "weight_scale"), (64, 2), 1),
        (layer.format("o", "weight_packed"), (64, 8), 1),
        (layer.format("q", "weight_scale"), (64, 1), 0),
        (layer.format("q", "input_scale"), (1,), None),
        (layer.format("o", "input_scale"), (1,), None),
    ):
        assert cut_of(name, shape, CONFIG, 2, 1).dim == dim, name
