"""Products of 8-bit floats against their formats written out in numpy, and layers that are trained with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.qat import apply_qat
from arriero.errors import ConfigError
from arriero.models import fp8_linear
from arriero.models.config import LlamaConfig
from arriero.models.fp8_linear import Fp8Linear, check_device, fp8_product
from arriero.models.llama import LlamaForCausalLM
from arriero.models.products import Linear
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.eight_bits import apply_fp8, describe_fp8, is_fp8
from arriero.parallel.parallelize import parallelize
from arriero.parallel.processes import Processes
from arriero.quantization.linear import quantize_layers
from arriero.quantization.qat import QatSettings
from arriero.quantization.schemes import Fp8Weights

CPU = torch.device("cpu")
OUT, IN = 48, 80
BF16 = torch.bfloat16
# Format: bits of the mantissa, least exponent, greatest number (arXiv:2209.05433, table 1).
FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def rounded(x: Tensor, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What 8 bits hold of a tensor, scaled to the format's greatest number: round to nearest, ties to even."""
    mantissa, least, greatest = FORMATS[name]
    wide = x.detach().double().numpy()
    scale = np.float32(greatest / max(np.abs(wide).max(), 1e-12))
    values = (wide.astype(np.float32) * scale).astype(np.float64)
    exponents = np.frexp(values)[1] - 1
    step = 2.0 ** (np.maximum(exponents, least) - mantissa)
    return np.rint(values / step) * step / np.float64(scale)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def products(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8_product(x, weight, None)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def distance(found: Tensor, expected: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Relative Frobenius norm of the difference."""
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_three_products_are_those_of_rounded_numbers(tokens: int, dtype: torch.dtype) -> None:
    x, weight = draw(tokens, IN, seed=1, dtype=dtype) * 3e-3, draw(OUT, IN, seed=2, dtype=dtype) * 20
    grad = draw(tokens, OUT, seed=3, dtype=dtype) * 1e-6
    y, grad_x, grad_weight = products(x, weight, grad)
    limit = 1e-6 if dtype == torch.float32 else 2**-8  # products add up in fp32
    inputs, matrix, gradient = rounded(x, "e4m3"), rounded(weight, "e4m3"), rounded(grad, "e5m2")
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, dtype)
    assert distance(y, inputs @ matrix.T) <= limit
    assert distance(grad_x, gradient @ matrix) <= limit
    assert distance(grad_weight, gradient.T @ inputs) <= limit


def test_they_are_near_the_exact_ones() -> None:
    """A number rounded to 3 bits is off by 2.6 % in the mean, to 2 bits by 5.2 %; two independent errors add in squares."""
    x, weight, grad = draw(256, 192, seed=1), draw(128, 192, seed=2), draw(256, 128, seed=3)
    y, grad_x, grad_weight = products(x, weight, grad)
    assert 0.02 < distance(y, (x.double() @ weight.double().T).numpy()) < 0.04
    assert 0.03 < distance(grad_x, (grad.double() @ weight.double()).numpy()) < 0.065
    assert 0.03 < distance(grad_weight, (grad.double().T @ x.double()).numpy()) < 0.065


@pytest.mark.parametrize("zero", ["x", "weight", "grad"])
def test_zeros_give_zeros(zero: str) -> None:
    given = {"x": draw(5, IN, seed=1), "weight": draw(OUT, IN, seed=2), "grad": draw(5, OUT, seed=3)}
    given[zero].zero_()
    y, grad_x, grad_weight = products(**given)
    assert all(torch.isfinite(tensor).all() for tensor in (y, grad_x, grad_weight))
    assert not y.any() or zero == "grad"
    assert not grad_x.any() or zero == "x"
    assert not grad_weight.any() or zero == "weight"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight, grad = draw(5, IN, seed=1), draw(OUT, IN, seed=2), draw(5, OUT, seed=3)
    x[2, 7] = bad
    y, _, grad_weight = products(x, weight, grad)
    assert y.isnan().all()
    assert grad_weight.isnan().all()
    x[2, 7], grad[1, 3] = 0.0, bad
    _, grad_x, grad_weight = products(x, weight, grad)
    assert grad_x.isnan().all()
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("greatest", [1e-30, 1e30])
def test_any_magnitude_keeps_its_place(greatest: float) -> None:
    """Numbers far below 1e-12 get no scale of their own and vanish; large ones do not overflow."""
    x = torch.full((16, 16), greatest)
    y = fp8_product(x, torch.eye(16), None)
    torch.testing.assert_close(y, x if greatest > 1 else torch.zeros_like(x), rtol=1e-6, atol=0)


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Fp8Linear:
    made = Fp8Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number))
    return made.to(dtype)


def test_under_autocast_outputs_are_bf16_and_gradients_the_weights_own_type() -> None:
    made, x = layer(), draw(2, 9, IN, seed=4).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        y = made(x)
    y.sum().backward()
    assert made.bias is not None
    assert (y.dtype, y.shape) == (BF16, (2, 9, OUT))
    assert x.grad is not None
    assert made.weight.grad is not None
    assert (x.grad.dtype, made.weight.grad.dtype, made.bias.grad.dtype) == (torch.float32,) * 3  # type: ignore[union-attr]
    flat = x.detach().flatten(0, 1)
    expected = rounded(flat, "e4m3") @ rounded(made.weight, "e4m3").T + made.bias.detach().double().numpy()
    assert distance(y.detach().flatten(0, 1), expected) <= 2**-7  # rounded to bf16 before and after the bias
    assert distance(made.weight.grad, np.ones((OUT, 18)) @ rounded(flat, "e4m3")) <= 1e-6


def test_a_layer_that_is_not_trained_computes_in_its_own_type() -> None:
    made, x = layer(BF16).eval(), draw(3, IN, seed=4, dtype=BF16)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    assert not torch.equal(made.train()(x), made.eval()(x))


def kept(made: Fp8Linear) -> list[Tensor]:
    """What autograd holds between the passes, the weight left out."""
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        made(draw(64, IN, seed=4, dtype=BF16).requires_grad_())
    return [tensor for tensor in held if tensor.shape != made.weight.shape]


def test_inputs_are_kept_in_one_byte_and_only_for_weights_that_are_trained() -> None:
    made = layer(BF16, bias=False)
    assert sum(tensor.nbytes for tensor in kept(made)) == 64 * IN + 2 * 4  # and two scales
    made.weight.requires_grad_(False)
    assert sum(tensor.nbytes for tensor in kept(made)) == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_give_the_same_from_one_graph(recompute: bool) -> None:
    torch._dynamo.reset()
    block = nn.Module()
    block.add_module("self_attn", nn.Identity())
    block.add_module("first", layer(BF16))
    block.forward = lambda x: block.get_submodule("first")(x).square()  # type: ignore[method-assign]
    eager: list[tuple[Tensor, ...]] = []
    lengths = (16, 17, 40, 33, 64, 35)
    if recompute:
        apply_activation_checkpointing([block])
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for call in (block.forward, compiled):
        for index, length in enumerate(lengths):
            block.zero_grad()
            x = draw(2, length, IN, seed=length, dtype=BF16).requires_grad_()
            y = call(x)
            y.sum().backward()
            found = tuple(
                t.detach().clone() for t in (y, x.grad, *(p.grad for p in block.parameters())) if t is not None
            )
            if call is compiled:
                assert all(torch.equal(one, other) for one, other in zip(found, eager[index], strict=True))
            else:
                eager.append(found)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert 0 < graphs <= 3  # the first length, then multiples of 16 and others of any length


# Whole models


def model(**changes: Any) -> LlamaForCausalLM:
    shape: dict[str, Any] = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    made = LlamaForCausalLM(LlamaConfig.from_dict(shape | {"rms_norm_eps": 1e-5} | changes))
    made.init_weights(0)
    return made


def test_matrices_of_decoder_layers_and_nothing_else() -> None:
    made = model()
    names, parameters = list(made.state_dict()), [id(parameter) for parameter in made.parameters()]
    parallelize(made, Processes(), CPU, fp8=True)
    assert (list(made.state_dict()), [id(p) for p in made.parameters()]) == (names, parameters)
    assert {name.rpartition(".")[2] for name, module in made.named_modules() if is_fp8(module)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert type(made.lm_head) is Linear
    assert describe_fp8(made) == "fp8: the products of 14 matrices"


def test_a_size_that_is_no_multiple_of_16_stays_as_it_is_and_is_told() -> None:
    made = model(intermediate_size=44)
    apply_fp8(made)
    assert describe_fp8(made) == (
        "fp8: the products of 8 matrices; not down_proj, gate_proj, up_proj, whose sizes are no multiples of 16"
    )
    assert type(made.get_submodule("model.layers.0.mlp.up_proj")) is Linear
    with pytest.raises(ConfigError, match=r"--fp8: no matrix .*q_proj is 32 x 24"):
        apply_fp8(model(hidden_size=24, intermediate_size=44))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
def test_an_adapter_stays_exact_beside_a_base_in_8_bits(kind: dict[str, Any], dropout: float) -> None:
    """The output moves by the base's rounding; the adapter's gradients are those of the exact products on it."""
    made = model()
    apply_lora(made, LoRAConfig(rank=4, dropout=dropout, target_modules=("q_proj",), **kind))
    layer = made.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B.weight.copy_(draw(32, 4, seed=5))  # type: ignore[union-attr]
    found = []
    for fp8 in (False, True):
        if fp8:
            apply_fp8(made)
            assert describe_fp8(made) == "fp8: the products of 14 matrices"
        made.zero_grad()
        torch.manual_seed(0)
        x = draw(33, 32, seed=1).requires_grad_()
        y = layer(x)
        y.backward(draw(33, 32, seed=2))
        assert layer.weight.grad is None
        found.append(
            [y.detach(), x.grad, *(p.grad for n, p in layer.named_parameters() if ".weight" in n and "lora" in n)]
        )
    for index, (exact, in_8_bits) in enumerate(zip(*found, strict=True)):
        assert exact is not None
        assert in_8_bits is not None
        apart = distance(in_8_bits, exact.double().numpy())
        assert apart < 0.065
        assert (apart > 0) == (index < 2), "the base's products are rounded, and only they"


def test_weights_that_are_rounded_otherwise_are_refused() -> None:
    quantized = model()
    quantize_layers(quantized, lambda name, _: Fp8Weights() if name.endswith("q_proj") else None)
    with pytest.raises(ConfigError, match="--fp8: the weights of this model are quantized"):
        apply_fp8(quantized)
    rounding = model()
    apply_qat(rounding, QatSettings("W4", 16))
    with pytest.raises(ConfigError, match="--fp8 and --qat"):
        apply_fp8(rounding)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if able:
            check_device(torch.device("cuda"))
        else:
            with pytest.raises(ConfigError, match=r"NVIDIA A100 has 8\.0"):
                check_device(torch.device("cuda"))


def test_a_cpu_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(fp8_linear.torch, "_scaled_mm", missing)
    with pytest.raises(ConfigError, match="has no 8-bit products on this cpu"):
        check_device(CPU)
