"""Optimizers by name: 8-bit moments against the written format and torchao, Muon and Lion against their definitions, SGD
against torch, exact resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim._muon import _zeropower_via_newtonschulz

from arriero.config.compatibility import check
from arriero.config.optimization import OPTIMIZERS, OptimizationOptions
from arriero.errors import ConfigError, FormatError
from arriero.training.optimizer import Optimizer
from arriero.training.optimizers import adamw_8bit
from arriero.training.optimizers.adamw_8bit import AdamW8bit
from arriero.training.optimizers.block_quantization import (
    BLOCK,
    codec,
    dequantize,
    dequantize_exactly,
    dynamic_values,
    quantize,
)
from arriero.training.optimizers.muon import COEFFICIENTS, EPS, ITERATIONS, orthogonalized

CPU = torch.device("cpu")
RATE = 3e-3


class Net(nn.Module):
    """The kinds of tensors that a decoder has: embedding, matrices, a norm, a bias, a head; one matrix of odd size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed_tokens = nn.Embedding(100, 64)
        self.up_proj = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96, bias=False)
        self.down_proj = nn.Linear(96, 67, bias=False)
        self.lm_head = nn.Linear(67, 100, bias=False)
        for key, parameter in self.named_parameters():
            if "norm" not in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.norm(F.silu(self.up_proj(self.embed_tokens(ids)))))
        logits: Tensor = self.lm_head(hidden)
        return logits


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(100, (64,), generator=generator)
    F.cross_entropy(model(ids).float(), (ids * 7 + 1) % 100).backward()


def state_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: part.tensor for name, part in optimizer.parts().items()}


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int, rate: float = RATE) -> list[float]:
    norms = []
    for step in range(first, last):
        gradients(model, step)
        optimizer.collect_gradients()
        norms.append(math.sqrt(optimizer.squared_norm()))
        optimizer.clip(1.0, norms[-1])
        optimizer.step(rate)
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_are_five_and_five_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through a file of plain tensors, and into a model and an optimizer made anew."""
    straight = Net().to(dtype)
    first = copy.deepcopy(straight)
    whole = Optimizer(straight, name=name, weight_decay=0.1)
    train(straight, whole, 0, 10)
    half = Optimizer(first, name=name, weight_decay=0.1)
    train(first, half, 0, 5)
    save_file({key: value.contiguous() for key, value in state_of(half).items()}, tmp_path / "optimizer.safetensors")
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second = Net(seed=9).to(dtype)
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed = Optimizer(second, name=name, weight_decay=0.1)
    resumed.load(load_file(tmp_path / "optimizer.safetensors"))
    train(second, resumed, 5, 10)
    for (key, one), other in zip(straight.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert state_of(whole).keys() == state_of(resumed).keys()
    for key, value in state_of(whole).items():
        assert value.dtype == state_of(resumed)[key].dtype, key
        assert torch.equal(value, state_of(resumed)[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name: str) -> None:
    model = Net()

    def loss() -> float:
        ids = torch.arange(100)
        with torch.no_grad():
            return float(F.cross_entropy(model(ids), (ids * 7 + 1) % 100))

    before = loss()
    rates = {"lion": 3e-3, "sgd": 1.0}  # beside the others' 1e-2
    optimizer = Optimizer(model, name=name, sgd_momentum=0.9)
    train(model, optimizer, 0, 60, rate=rates.get(name, 1e-2))
    assert loss() < 0.5 * before


def test_who_is_stepped_by_what() -> None:
    def kinds(name: str) -> dict[str, set[str]]:
        model = Net()
        optimizer = Optimizer(model, name=name)
        train(model, optimizer, 0, 1)
        found: dict[str, set[str]] = {}
        for key in optimizer.parts():
            parameter, _, kind = key.rpartition(".")
            found.setdefault(parameter, set()).add(kind)
        return found

    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert set(map(frozenset, kinds("adamw").values())) == {frozenset(adam)}
    assert set(map(frozenset, kinds("adamw_8bit").values())) == {frozenset(adam)}
    assert kinds("muon") == {
        "embed_tokens.weight": adam,
        "lm_head.weight": adam,
        "norm.weight": adam,
        "up_proj.bias": adam,
        "up_proj.weight": {"momentum_buffer"},
        "down_proj.weight": {"momentum_buffer"},
    }
    packed = next(rule for rule in Optimizer(Net(), name="adamw_8bit").rules if isinstance(rule, AdamW8bit))
    assert set(packed.tensors) == {"up_proj.weight", "down_proj.weight", "lm_head.weight"}


def test_moments_take_a_byte_each() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(512, 512))
    optimizer = Optimizer(model, name="adamw_8bit")
    model.weight.grad = torch.ones(512, 512)
    optimizer.step(1e-3)
    assert optimizer.bytes_held() == 2 * (512 * 512 + 4 * 512 * 512 // BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_values_are_the_papers(signed: bool) -> None:
    """By the format's bits: sign, a run of zeros that is the exponent, an indicator 1, and a linear fraction (appendix F)."""
    values = {0.0, 1.0}
    for code in range(1, 2**7 if signed else 2**8):
        bits = f"{code:07b}" if signed else f"{code:08b}"
        zeros = len(bits) - len(bits.lstrip("0"))
        fraction = bits[zeros + 1 :]
        if zeros == 7:
            continue
        width = 0.9 / 2 ** len(fraction)
        value = (0.1 + width * (int(fraction or "0", 2) + 0.5)) * 10.0**-zeros
        values |= {value, -value} if signed else {value}
    ours = dynamic_values(signed)
    # unsigned: the fraction of the greatest decade has 7 bits, of the least 1: 254 values, 0 and 1
    expected = torch.tensor(sorted(values)[-256:], dtype=torch.float64)
    assert ours.shape == (256,)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_values_are_torchaos(signed: bool) -> None:
    quant_utils = pytest.importorskip("torchao.optim.quant_utils")
    theirs = torch.tensor(quant_utils.create_dynamic_map(signed))
    torch.testing.assert_close(dynamic_values(signed), theirs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_becomes_the_nearest_value(signed: bool) -> None:
    """All 65536 upper halves of a float within range, and the borders themselves and their neighbours on both sides."""
    values = dynamic_values(signed)
    borders = ((values[1:] + values[:-1]) / 2).tolist()
    upper = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    points = [
        upper,
        (upper.view(torch.int32) | 0x8001).view(torch.float32),
        torch.tensor([x for b in borders for x in (b, math.nextafter(b, 2), b * (1 + 2e-7), b * (1 - 2e-7))]),
    ]
    x = torch.cat(points)
    x = x[torch.isfinite(x) & (x <= 1.0) & (x >= (-1.0 if signed else 0.0))]
    codes = codec(signed, CPU).encode(x)
    distance = (x.double() - values.double()[codes.int()]).abs()
    nearest = (x.double()[:, None] - values.double()[None]).abs().amin(1)
    # a border is rounded to fp32, by 2**-24 of it at most; a number within that of it is so much nearer to one value
    assert bool((distance <= nearest + 2**-23 * x.double().abs()).all())
    assert torch.equal(codec(signed, CPU).encode(values), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_blocks_keep_their_greatest_number_and_small_neighbours(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[0] = -1e4  # only its own block gets coarse
    codes, scales = quantize(x, signed=True)
    back = dequantize(codes, scales, signed=True)
    assert scales.shape == (math.ceil(count / 256),)
    assert scales[0] == 1e4
    for start in range(0, count, 256):
        block, again = x[start : start + 256], back[start : start + 256]
        # half the widest gap of the code, times the block's scale
        gap = float((dynamic_values(True)[1:] - dynamic_values(True)[:-1]).max())
        assert float((block - again).abs().max()) <= gap / 2 * float(block.abs().max()) * 1.0001
    zeros = dequantize(*quantize(torch.zeros(300), signed=False), signed=False)
    assert not zeros.any()
    tiny = torch.full((256,), 1e-20)
    torch.testing.assert_close(dequantize(*quantize(tiny, signed=False), signed=False), tiny)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [3e-31, 7.3e-12, 1.0, 1.9e30])
def test_unpacked_numbers_are_packed_to_the_same_bits(scale: float, sign: float, signed: bool) -> None:
    """Every code beside a greatest number of either sign, at 600 scales; and again after a second time."""
    sign = sign if signed else 1.0
    values = dynamic_values(signed)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.empty(200, BLOCK)
        x[:] = values[torch.randperm(256, generator=generator)]
        x = torch.where(x.abs() == 1.0, sign, x).roll(1, 0) * (1 + torch.rand(200, 1, generator=generator)) * scale
        codes, scales = quantize(x.view(-1)[:-100], signed)  # the last block is a part of one
        assert len(codes.unique()) >= 255
        again = quantize(dequantize_exactly(codes, scales, signed), signed)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)
    exact, used = (f(codes, scales, signed) for f in (dequantize_exactly, dequantize))
    assert torch.equal(exact[codes != 0], used[codes != 0])
    # the last half of the widest gap
    assert float((exact - used).abs().max()) <= 0.0071 * float(scales.max())
    zeros = quantize(torch.zeros(300), signed)
    for one, other in zip(quantize(dequantize_exactly(*zeros, signed), signed), zeros, strict=True):
        assert torch.equal(one, other)


def test_8bit_steps_are_torchaos() -> None:
    """Weights after 12 steps on the same gradients. torchao compiles its step; here it runs as plain Python."""
    torchao = pytest.importorskip("torchao.optim")
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    rule = AdamW8bit({"w": ours}, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    reference = torchao.AdamW8bit([theirs], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(12):
            ours.grad = torch.randn(64, 128, generator=generator) * torch.rand(64, 1, generator=generator)
            theirs.grad = ours.grad.clone()
            rule.step(RATE)
            reference.step()
    # a number at the border of two codes may fall either way, so a few weights may differ by more than rounding
    difference = (ours - theirs).detach().abs()
    assert float(difference.quantile(0.99)) < 1e-6
    assert float(difference.max()) < 0.05 * float((ours - start).detach().abs().max())
    codes = rule.moments["w"].exp_avg.int() - reference.state[theirs]["exp_avg"].codes.int()
    assert int(codes.abs().max()) <= 1
    assert float((codes != 0).float().mean()) < 0.001


def test_8bit_follows_fp32() -> None:
    """On a real problem: the weights go where AdamW's go, and the losses agree."""
    exact, packed = Net(), Net()
    one, other = Optimizer(exact), Optimizer(packed, name="adamw_8bit")
    norms = zip(train(exact, one, 0, 40), train(packed, other, 0, 40), strict=True)
    assert max(abs(a - b) / a for a, b in norms) < 0.05
    for key, parameter in exact.named_parameters():
        moved = parameter - dict(Net().named_parameters())[key]
        error = parameter - dict(packed.named_parameters())[key]
        assert float(error.detach().norm()) < 0.1 * float(moved.detach().norm()), key


def test_8bit_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (BLOCK, 4 * BLOCK, 2**18):
        monkeypatch.setattr(adamw_8bit, "CPU_CHUNK", chunk)
        weight = torch.ones(37, 61)
        rule = AdamW8bit({"w": weight}, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        for step in range(3):
            weight.grad = torch.randn(37, 61, generator=torch.Generator().manual_seed(step))
            rule.step(RATE)
        results.append({"w": weight, **{key: value.clone() for key, value in rule.state().items()}})
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


def test_muon_is_its_definition() -> None:
    """One step from rest with the momentum's first gradient: the polar factor by SVD, as large as AdamW's updates."""
    for rows, columns in ((48, 96), (96, 48)):
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)))
        start = model.weight.detach().clone()
        optimizer = Optimizer(model, name="muon", weight_decay=0.5, momentum=0.9)
        grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
        model.weight.grad = grad.clone()
        optimizer.step(RATE)
        update = (start * (1 - RATE * 0.5) - model.weight.detach()) / RATE
        u, _, v = torch.linalg.svd(grad, full_matrices=False)
        polar = u @ v
        # Newton-Schulz with these coefficients leaves singular values of 0.7 to 1.2 (Jordan's post), the vectors are exact
        scale = 0.2 * math.sqrt(max(rows, columns))
        singular = torch.linalg.svdvals(update) / scale
        assert 0.65 < float(singular.min()) <= float(singular.max()) < 1.25
        assert float(F.cosine_similarity(update.flatten(), polar.flatten(), dim=0)) > 0.97
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)  # Liu et al.: RMS 0.2 as AdamW's


@pytest.mark.parametrize(("rows", "columns"), [(48, 96), (96, 48), (33, 33)])
def test_newton_schulz_is_torchs(rows: int, columns: int) -> None:
    """torch's works in bf16: the same there to the bit, and in fp32 up to the rounding of bf16."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, ITERATIONS, EPS)
    assert torch.equal(orthogonalized(matrix.bfloat16()), theirs)
    exact = orthogonalized(matrix)
    assert float((exact - theirs).norm()) < 0.02 * float(exact.norm())
    assert not orthogonalized(torch.zeros(rows, columns)).any()


def test_muon_steps_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps beside torch.optim.Muon, whose Newton-Schulz iterations are made fp32 for this."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda x, *_: orthogonalized(x))
    model, start = nn.Module(), torch.randn(24, 40, generator=torch.Generator().manual_seed(5))
    model.weight, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Optimizer(model, name="muon", weight_decay=0.3, momentum=0.9)
    reference = torch.optim.Muon(
        [theirs], lr=RATE, weight_decay=0.3, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        model.weight.grad, theirs.grad = grad.clone(), grad.clone()
        ours.step(RATE)
        reference.step()
    torch.testing.assert_close(model.weight, theirs, rtol=1e-6, atol=1e-7)


def test_muon_momentum_is_nesterovs() -> None:
    """The buffer after three steps, by its recurrence."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = Optimizer(model, name="muon", momentum=0.9)
    expected = torch.zeros(8, 8)
    for step in range(3):
        grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        model.weight.grad = grad.clone()
        optimizer.step(RATE)
        expected = 0.9 * expected + 0.1 * grad
    torch.testing.assert_close(optimizer.parts()["weight.momentum_buffer"].tensor, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_steps_are_torchs(momentum: float) -> None:
    """torch's weight decay goes through the momentum, so it is made beside it: of matrices only, and decoupled."""
    ours, theirs = Net(), Net()
    optimizer = Optimizer(ours, name="sgd", sgd_momentum=momentum, weight_decay=0.1)
    expected = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=momentum)
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step(0.05)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1 - 0.05 * 0.1)
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert (optimizer.bytes_held() == 0) == (momentum == 0)


def test_plain_sgd_with_decay_is_torchs() -> None:
    """Without momentum, weight decay is the same coupled and decoupled."""
    ours, theirs = Net(), Net()
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim < 2]
    optimizer = Optimizer(ours, name="sgd", weight_decay=0.3)
    expected = torch.optim.SGD([{"params": matrices, "weight_decay": 0.3}, {"params": vectors}], lr=0.05)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step(0.05)
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_lion_is_algorithm_2() -> None:
    """The paper's lines, in NumPy and fp64; gradients are given, so that no sign turns by rounding."""
    matrix, vector = nn.Parameter(torch.full((3, 4), 0.5)), nn.Parameter(torch.full((4,), 0.5))
    model = nn.ParameterDict({"matrix": matrix, "vector": vector})
    optimizer = Optimizer(model, name="lion", lion_betas=(0.8, 0.95), weight_decay=0.2)
    rate, beta1, beta2 = 0.01, 0.8, 0.95
    expected = {"matrix": np.full((3, 4), 0.5), "vector": np.full(4, 0.5)}
    means = {key: np.zeros_like(value) for key, value in expected.items()}
    generator = np.random.default_rng(0)
    for _ in range(8):
        for key, decay in (("matrix", 0.2), ("vector", 0.0)):
            gradient = generator.normal(size=expected[key].shape)
            model[key].grad = torch.from_numpy(gradient).float()
            update = np.sign(beta1 * means[key] + (1 - beta1) * gradient)
            expected[key] = expected[key] - rate * (update + decay * expected[key])
            means[key] = beta2 * means[key] + (1 - beta2) * gradient
        optimizer.step(rate)
    for key, value in expected.items():
        torch.testing.assert_close(model[key].detach().double(), torch.from_numpy(value), rtol=1e-6, atol=1e-7)
        kept = optimizer.parts()[f"{key}.exp_avg"].tensor.double()
        torch.testing.assert_close(kept, torch.from_numpy(means[key]), rtol=1e-6, atol=1e-7)


def test_sums_are_not_taken_for_means() -> None:
    """Muon's momentum of an adapter's matrices is a mean of gradients, SGD's a sum."""
    model = nn.ParameterDict({"up_proj": nn.Parameter(torch.ones(4, 4))})
    optimizer = Optimizer(model, name="muon")
    model["up_proj"].grad = torch.ones(4, 4)
    optimizer.step(0.1)
    with pytest.raises(FormatError, match="velocity is missing"):
        Optimizer(model, name="sgd", sgd_momentum=0.9).load(state_of(optimizer))


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("lion_32bit", "lion"),
        ("SGD", "sgd"),
        ("muon", "muon"),
    ],
)
def test_transformers_names(word: str, name: str) -> None:
    assert OptimizationOptions(optim=word).optim == name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("paged_adamw_32bit", "give --optim adamw$"),
        ("paged_adamw_8bit", "give --optim adamw_8bit$"),
        ("paged_lion_8bit", "give --optim lion$"),
        ("lion_8bit", "fp32 here; give --optim lion$"),
        ("adafactor", "choose one of adamw, adamw_8bit, muon, lion, sgd$"),
    ],
)
def test_optimizers_that_are_not_here_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizationOptions(optim=word)


def test_settings_of_another_optimizer_are_told() -> None:
    options = OptimizationOptions(optim="lion", adam_beta1=0.8, muon_momentum=0.9, lion_beta2=0.95)
    found = check((options,), frozenset({"optim", "adam_beta1", "muon_momentum", "lion_beta2"}))
    assert found == [f"--{name} has no effect with --optim lion" for name in ("muon_momentum", "adam_beta1")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_keep_what_half_precision_would_round_away(name: str) -> None:
    half, full = Net().bfloat16(), Net().bfloat16().float()
    optimizer, exact = Optimizer(half, name=name), Optimizer(full, name=name)
    for step in range(4):
        gradients(half, step)
        for one, other in zip(half.parameters(), full.parameters(), strict=True):
            assert one.grad is not None
            other.grad = one.grad.float()
        optimizer.collect_gradients()
        optimizer.step(1e-5)
        exact.step(1e-5)
        optimizer.zero_grad()
    for key, parameter in full.named_parameters():
        assert torch.equal(optimizer.masters[key], parameter), key
        assert torch.equal(dict(half.named_parameters())[key], parameter.bfloat16()), key


def test_the_norm_of_a_large_tensor_is_right() -> None:
    model = nn.Linear(512, 20000)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    exact = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters()))
    assert math.sqrt(Optimizer(model).squared_norm()) == pytest.approx(exact, rel=1e-6)


def test_clipping_is_torchs() -> None:
    for limit in (0.0, 0.1, 1e6):
        ours, theirs = Net(), Net()
        gradients(ours, 0)
        gradients(theirs, 0)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
        optimizer = Optimizer(ours)
        norm = math.sqrt(optimizer.squared_norm())
        optimizer.clip(limit, norm)
        assert norm == pytest.approx(float(expected), rel=1e-6)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_the_loss_scale_comes_off_every_optimizers_gradients() -> None:
    """`param_groups` is what torch's scaler reads."""
    for name in OPTIMIZERS:
        model = Net()
        optimizer: Any = Optimizer(model, name=name)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        gradients(model, 0)
        before = {key: grad.clone() for key, grad in optimizer.gradients().items()}
        scaler.unscale_(optimizer)
        for key, grad in optimizer.gradients().items():
            torch.testing.assert_close(grad * 1024.0, before[key])


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        ("adamw", "muon", r"up_proj.weight.momentum_buffer is missing"),
        ("muon", "adamw", r"up_proj.weight.step is missing"),
        ("muon", "adamw_8bit", r"up_proj.weight.step is missing"),
        ("lion", "adamw", r"weight.step is missing"),
        ("muon", "lion", r"weight.exp_avg is missing"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(saved: str, loading: str, message: str) -> None:
    model = Net()
    optimizer = Optimizer(model, name=saved)
    train(model, optimizer, 0, 1)
    with pytest.raises(FormatError, match=message) as error:
        Optimizer(Net(), name=loading).load(state_of(optimizer))
    assert "\n" not in str(error.value)


def test_adamw_goes_on_in_8_bits_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Both have the same state; taking AdamW's rounds it, which is told, and going back loses nothing."""
    model = Net()
    exact = Optimizer(model)
    train(model, exact, 0, 4)
    packed = Optimizer(copy.deepcopy(model), name="adamw_8bit")
    packed.load(state_of(exact))
    assert "rounded to 8 bits anew" in capsys.readouterr().out
    saved, rounded = state_of(exact), state_of(packed)
    assert saved.keys() == rounded.keys()
    for key, value in saved.items():
        if not key.endswith((".step", "norm.weight.exp_avg", "bias.exp_avg")):
            assert float((rounded[key] - value).abs().max()) <= 0.015 * float(value.abs().max()), key
    for name in ("adamw", "adamw_8bit"):
        other = Optimizer(Net(), name=name)
        other.load(rounded)
        for key, value in rounded.items():
            assert torch.equal(state_of(other)[key], value), key
    assert capsys.readouterr().out == ""


def test_a_state_of_another_shape_or_kind_is_refused() -> None:
    model = Net()
    optimizer = Optimizer(model, name="adamw_8bit")
    train(model, optimizer, 0, 1)
    state = state_of(optimizer)
    with pytest.raises(FormatError, match=r"up_proj.weight.exp_avg is \(3,\), not \(96, 64\)"):
        Optimizer(Net(), name="adamw_8bit").load({**state, "up_proj.weight.exp_avg": torch.zeros(3)})
    codes = torch.zeros(96, 64, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"up_proj.weight.exp_avg is uint8, not float32"):
        Optimizer(Net(), name="adamw_8bit").load({**state, "up_proj.weight.exp_avg": codes})


def test_from_options() -> None:
    options = OptimizationOptions(optim="muon", muon_momentum=0.8, weight_decay=0.3, adam_beta2=0.95)
    optimizer: Any = Optimizer.from_options(Net(), options)
    adam, muon = optimizer.rules
    adam = adam.optimizer
    assert [group["weight_decay"] for group in adam.param_groups] == [0.3, 0.0]
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    assert (muon.momentum, muon.weight_decay) == (0.8, 0.3)
    with pytest.raises(ConfigError, match="sophia"):
        Optimizer(Net(), name="sophia")
