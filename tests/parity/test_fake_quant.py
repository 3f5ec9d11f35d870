"""Rounding in training against torch's own fake quantization and against gradients that autograd makes of plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.quantization.fake_quant import input_scale, rounded_product, rounded_weight, weight_scales
from arriero.quantization.integers import IntegerScheme

TOKENS, INPUTS, OUTPUTS, RANK = 11, 32, 6, 3
SCHEMES = {"8 bits": IntegerScheme(8), "4 bits": IntegerScheme(4), "4 bits in groups": IntegerScheme(4, 8)}


@pytest.fixture(params=SCHEMES, ids=list(SCHEMES))
def scheme(request: pytest.FixtureRequest) -> IntegerScheme:
    return SCHEMES[request.param]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return x + (rounded - x).detach()


def plain_weight(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    """The rule of the module, written out."""
    grouped = weight.unflatten(-1, (-1, scheme.group_size or weight.shape[1]))
    scale = grouped.detach().abs().amax(-1, keepdim=True) / scheme.high
    return straight_through(weight, (torch.round(grouped / scale) * scale).flatten(-2))


def plain_input(x: Tensor, greatest: Tensor) -> Tensor:
    """Clipping that autograd differentiates, then rounding that it passes through."""
    scale = greatest / 127
    clipped = torch.minimum(torch.maximum(x, -128 * scale), greatest)
    return straight_through(clipped, torch.round(clipped / scale) * scale)


def inputs_apart_from_the_edge(greatest: float) -> Tensor:
    """Inputs of which some are clipped, none where rounding and clipping disagree about what is outside."""
    x = normal(TOKENS, INPUTS, seed=1)
    steps = x / (greatest / 127)
    edge = ((steps > 127) & (steps < 127.5)) | ((steps < -128) & (steps > -128.5))
    assert (steps > 128).any()
    assert (steps < -129).any()
    return x.masked_fill(edge, 0.0)


def test_weights_are_those_of_torch(scheme: IntegerScheme) -> None:
    """Scales are powers of two here: torch multiplies by their inverses, which rounds otherwise."""
    weight = normal(OUTPUTS, INPUTS, seed=0).clamp(-0.9, 0.9)
    grouped = weight.view(-1, scheme.group_size or INPUTS)
    grouped[:, 3] = scheme.high * 2.0 ** (-6 if scheme.bits == 8 else -2)  # the greatest of each group
    scales = weight_scales(weight, scheme)
    assert torch.equal(scales, 2.0 ** torch.round(torch.log2(scales)))
    zeros = torch.zeros(len(grouped), dtype=torch.int32)
    truth = torch.fake_quantize_per_channel_affine(grouped, scales.reshape(-1), zeros, 0, scheme.low, scheme.high)
    assert torch.equal(rounded_weight(weight, scales, scheme), truth.view_as(weight))


def test_inputs_and_their_gradient_are_those_of_torch() -> None:
    greatest = 127 / 64  # a scale of 1/64
    weight, identity = torch.eye(INPUTS), IntegerScheme(8)  # its own rounded form: the products are sums of one number
    first, second = (normal(TOKENS, INPUTS, seed=1).requires_grad_() for _ in range(2))
    made = rounded_product(first, weight, None, identity, input_range=torch.tensor([greatest]))
    truth = torch.fake_quantize_per_tensor_affine(second, 1 / 64, 0, -128, 127)
    assert torch.equal(made, truth)
    assert (first.detach().abs() > greatest).any()
    grad = normal(TOKENS, INPUTS, seed=2)
    made.backward(grad)
    truth.backward(grad)
    assert torch.equal(first.grad, second.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("rounds_inputs", [False, True], ids=["W", "A8W"])
def test_gradients_are_those_of_the_written_out_estimator(
    scheme: IntegerScheme, adapted: bool, rounds_inputs: bool
) -> None:
    def leaves() -> dict[str, Tensor]:
        made = {
            "x": inputs_apart_from_the_edge(1.5),
            "weight": normal(OUTPUTS, INPUTS, seed=0),
            "bias": normal(OUTPUTS, seed=3),
            "range": torch.tensor([1.5]),
            "a": normal(RANK, INPUTS, seed=4),
            "b": normal(OUTPUTS, RANK, seed=5) * 0.1,
        }
        used = {"x", "bias", *(("a", "b") if adapted else ("weight",)), *(("range",) if rounds_inputs else ())}
        return {name: tensor.requires_grad_(name in used) for name, tensor in made.items()}

    own, other = leaves(), leaves()
    made = rounded_product(
        own["x"],
        own["weight"],
        own["bias"],
        scheme,
        input_range=own["range"] if rounds_inputs else None,
        adapter=(own["a"], own["b"], 0.5) if adapted else None,
    )
    total = other["weight"] + 0.5 * other["b"] @ other["a"] if adapted else other["weight"]
    x = plain_input(other["x"], other["range"]) if rounds_inputs else other["x"]
    truth = F.linear(x, plain_weight(total, scheme), other["bias"])
    torch.testing.assert_close(made, truth, rtol=1e-6, atol=1e-6)
    grad = normal(TOKENS, OUTPUTS, seed=6)
    made.backward(grad)
    truth.backward(grad)
    for name, tensor in own.items():
        assert (tensor.grad is not None) == tensor.requires_grad, name
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, other[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_the_range_learns_from_clipped_inputs() -> None:
    """PACT's rule in closed form, and a difference quotient of the clipping."""
    greatest, x = 1.25, inputs_apart_from_the_edge(1.25)
    grad, eye = normal(TOKENS, INPUTS, seed=6), torch.eye(INPUTS)
    learned = torch.tensor([greatest], requires_grad=True)
    rounded_product(x, eye, None, IntegerScheme(8), input_range=learned).backward(grad)
    closed = grad[x > greatest].sum() - 128 / 127 * grad[x < -greatest * 128 / 127].sum()
    torch.testing.assert_close(learned.grad, closed.reshape(1), rtol=1e-5, atol=1e-5)

    def clipped(at: float) -> Tensor:
        return (grad.double() * x.double().clamp(-128 / 127 * at, at)).sum()

    step = 1e-6
    quotient = (clipped(greatest + step) - clipped(greatest - step)) / (2 * step)
    assert float(learned.grad) == pytest.approx(float(quotient), rel=1e-5)


def test_a_range_below_zero_is_held_above_it() -> None:
    x = normal(TOKENS, INPUTS, seed=1)
    y = rounded_product(x, torch.eye(INPUTS), None, IntegerScheme(8), input_range=torch.tensor([-1.0]))
    assert torch.isfinite(y).all()
    assert (input_scale(torch.tensor([-1.0])) > 0).all()


def test_zero_weights_stay_zero() -> None:
    x, weight = normal(TOKENS, INPUTS, seed=1), torch.zeros(OUTPUTS, INPUTS, requires_grad=True)
    y = rounded_product(x, weight, None, IntegerScheme(4, 8))
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(weight.grad).all()


def test_nothing_of_the_weights_size_is_kept(scheme: IntegerScheme) -> None:
    """What autograd keeps is the inputs and parameters themselves and the scales: no rounded copy, no mask, no sum."""
    weight, x = normal(OUTPUTS, INPUTS, seed=0).requires_grad_(), normal(TOKENS, INPUTS, seed=1).requires_grad_()
    a, b = normal(RANK, INPUTS, seed=4).requires_grad_(), normal(OUTPUTS, RANK, seed=5).requires_grad_()
    greatest = torch.tensor([1.0], requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rounded_product(x, weight, None, scheme, input_range=greatest, adapter=(a, b, 2.0))
    own = {tensor.data_ptr() for tensor in (weight, x, a, b, greatest)}
    others = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in own]
    assert others == [(OUTPUTS, scheme.groups(INPUTS))]


def test_half_precision_rounds_once() -> None:
    """Under autocast both factors are the fp32 products of integer and scale, rounded to bfloat16."""
    weight, x = normal(OUTPUTS, INPUTS, seed=0), normal(TOKENS, INPUTS, seed=1)
    greatest, scheme = torch.tensor([2.0]), IntegerScheme(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rounded_product(x, weight, None, scheme, input_range=greatest)
    scale = 2.0 / torch.tensor(127.0)
    low = (torch.round(x.bfloat16().float() / scale).clamp(-128, 127) * scale).bfloat16()
    truth = F.linear(low, plain_weight(weight, scheme).bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, truth)
