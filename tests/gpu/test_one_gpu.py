"""One GPU: every way to train on it, beside the same run on the CPU or in fp32.

The bodies run on the CPU too, so that they are known to be right before they meet a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import layout_runs
from layout_runs import Run, compiler, make_trainer

from arriero.config.optimization import OPTIMIZERS
from arriero.errors import TrainingError
from arriero.models import attention as attention_module
from arriero.models.attention import AttentionInfo, attention, choose_backend
from arriero.models.fp8_linear import check_device, fp8_product
from arriero.parallel.processes import Processes
from arriero.training.checkpoint import take_snapshot, write_checkpoint
from arriero.training.optimizer import Optimizer
from arriero.training.trainer import StepRecord, Trainer

CPU = torch.device("cpu")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
HEADS_OF_16 = {"head_dim": 16}  # flash attention wants a multiple of 8
HALF: dict[str, dict[str, Any]] = {
    "bf16 O1": {"bf16": True},
    "bf16 O2": {"bf16": True, "fp16_opt_level": "O2"},
    "fp16 O1": {"fp16": True},
    "fp16 O2": {"fp16": True, "fp16_opt_level": "O2"},
}


# Every size a multiple of 16, in steps that leave the initial weights near where they are.
FP8_MODEL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.05}
FP8_O2 = HALF["bf16 O2"] | {"fp8": True}
FP8_RUN = Run(model=FP8_MODEL, precision=FP8_O2, optimization={"learning_rate": 2e-3}, steps=3)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    chosen = torch.device(request.param)
    monkeypatch.setattr(layout_runs, "CPU", chosen)
    return chosen


def run_on(run: Run, folder: Path, where: torch.device, monkeypatch: pytest.MonkeyPatch | None = None) -> Any:
    if monkeypatch is not None:
        monkeypatch.setattr(layout_runs, "CPU", where)
    trainer, recorder = make_trainer(run, None, Processes(), folder)
    trainer.train()
    return trainer, recorder.records


def differ(records: list[StepRecord], expected: list[StepRecord]) -> float:
    """The largest relative difference of a loss or gradient norm."""
    pairs = [
        (getattr(one, name), getattr(other, name))
        for one, other in zip(records, expected, strict=True)
        for name in ("loss", "grad_norm")
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@devices
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_fp32_is_that_of_the_cpu(
    lora: bool, packed: bool, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(lora=lora, packed=packed, accumulation=2)
    trainer, records = run_on(run, tmp_path, device)
    assert next(trainer.model.parameters()).device.type == device.type
    assert differ(records, run_on(run, tmp_path, CPU, monkeypatch)[1]) <= 1e-4


@devices
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_near_fp32(name: str, device: torch.device, tmp_path: Path) -> None:
    run = Run(precision=HALF[name], model=HEADS_OF_16, steps=3)
    trainer, records = run_on(run, tmp_path, device)
    expected = run_on(replace(run, precision={}), tmp_path, device)[1]
    assert not any(record.skipped for record in records)
    assert differ(records[:1], expected[:1]) <= 2e-2
    assert abs(records[-1].loss - expected[-1].loss) <= 5e-2 * expected[-1].loss
    held = {parameter.dtype for parameter in trainer.model.parameters()}
    assert held == {torch.float32 if "O1" in name else trainer.precision.dtype}
    assert bool(trainer.optimizer.masters) == ("O2" in name)


@devices
def test_an_overflow_of_fp16_is_left_out(device: torch.device, tmp_path: Path) -> None:
    """A loss scale that no gradient can bear comes down step by step, and the weights stay meanwhile."""
    run = Run(precision=HALF["fp16 O2"] | {"scale_loss": 2.0**40}, steps=2)
    trainer, _ = make_trainer(run, None, Processes(), tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    record = trainer.step()
    assert record.skipped
    assert trainer.precision.scaler.get_scale() == 2.0**39
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@devices
@pytest.mark.parametrize("packed", [True, False])
def test_compiled_layers_change_nothing(packed: bool, device: torch.device, tmp_path: Path) -> None:
    """By inductor on a GPU; on the CPU without its compiler."""
    run = Run(packed=packed, compiled=True, steps=2)
    if device.type == "cuda":
        records = run_on(run, tmp_path, device)[1]
    else:
        with compiler(run):
            records = run_on(run, tmp_path, device)[1]
    assert differ(records, run_on(replace(run, compiled=False), tmp_path, device)[1]) <= 1e-4


@devices
@pytest.mark.parametrize("granularity", ["full", "core_attn"])
def test_recomputation_changes_nothing_but_memory(granularity: str, device: torch.device, tmp_path: Path) -> None:
    run = Run(packed=False, steps=2, model={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6})
    peaks, found = [], []
    for precision in ({}, {"recompute": True, "recompute_granularity": granularity}):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found.append(run_on(replace(run, precision=precision), tmp_path, device)[1])
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
    assert differ(found[1], found[0]) <= 1e-5
    assert not peaks or granularity != "full" or peaks[1] <= peaks[0]


@devices
def test_flash_with_lengths_trains_as_a_mask_does(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows in bf16: on a GPU by flash attention with lengths, and by SDPA with a mask."""
    run = Run(precision=HALF["bf16 O2"], model=HEADS_OF_16, steps=3)
    query = torch.empty(1, 4, 8, 16, dtype=torch.bfloat16, device=device)
    assert choose_backend(query, AttentionInfo.documents([3, 5])) == ("varlen" if device.type == "cuda" else "sdpa")
    records = run_on(run, tmp_path, device)[1]
    monkeypatch.setattr(attention_module, "HAS_VARLEN", False)
    assert choose_backend(query, AttentionInfo.documents([3, 5])) == "sdpa"
    assert differ(records, run_on(run, tmp_path, device)[1]) <= 3e-2


@devices
@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_give_what_grouped_ones_do(masked: bool, device: torch.device) -> None:
    """fp32, with gradients. On a GPU grouped heads fall back to a kernel that writes all scores out; repeated ones do not."""
    size = 1024 if device.type == "cuda" else 64
    info, window = AttentionInfo.causal(), size // 4 if masked else None
    results, peaks = [], []
    for backend in ("sdpa", "repeated"):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, h, size, 64, generator=generator).to(device).requires_grad_() for h in (16, 4, 4)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        output = attention(*leaves, info, scale=0.125, sliding_window=window, backend=backend)  # type: ignore[arg-type]
        (output * torch.linspace(-1, 1, size, device=device)[:, None]).sum().backward()
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    scores = 2 * 16 * size * size * 4
    assert not peaks or peaks[1] < peaks[0] - scores


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Linear(96, 160)
        self.norm = nn.LayerNorm(160)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


@devices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_on_the_cpu(name: str, device: torch.device) -> None:
    """The fused kernel of AdamW, 8-bit moments, and Muon, which works in bf16 on a GPU."""
    moved: list[list[Tensor]] = []
    for where in (device, CPU):
        model = Matrices().to(where)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = Optimizer(model, name=name, weight_decay=0.1)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
            optimizer.clip(1.0, optimizer.squared_norm() ** 0.5)
            optimizer.step(1e-2)
        moved.append([(p.detach() - old).cpu() for p, old in zip(model.parameters(), start, strict=True)])
    for here, there in zip(*moved, strict=True):
        bound = 2e-2 if name == "muon" and here.ndim == 2 and device.type == "cuda" else 1e-3
        assert float((here - there).norm()) <= bound * float(there.norm())


@devices
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16 O2", "fp16 O2"])
def test_a_run_goes_on_from_its_checkpoint(precision: str, optim: str, device: torch.device, tmp_path: Path) -> None:
    """The state right after loading to the bit; then the same losses."""
    run = Run(precision=HALF.get(precision, {}), optimization={"optim": optim}, steps=4)
    straight, recorder = make_trainer(run, None, Processes(), tmp_path)
    recorder.stop_after = 2
    straight.train()
    snapshot = take_snapshot(straight.weights, straight.optimizer.parts(), straight.state, copy=True)
    write_checkpoint(tmp_path, snapshot)
    resumed, again = make_trainer(run, None, Processes(), tmp_path)
    resumed.resume(tmp_path / "checkpoint-2")
    assert _state(resumed).keys() == _state(straight).keys()
    for name, tensor in _state(resumed).items():
        assert torch.equal(tensor, _state(straight)[name]), name
    recorder.stop_after, straight.should_stop = None, False
    straight.train()
    resumed.train()
    # a GPU adds some gradients up in any order
    bound = 0.0 if device.type == "cpu" else 1e-5 if precision == "fp32" and optim != "muon" else 2e-2
    assert differ(again.records, recorder.records[2:]) <= bound


def _state(trainer: Trainer) -> dict[str, Tensor]:
    parts = {**trainer.optimizer.parts(), **trainer.weights.parts()}
    return {name: part.tensor.detach().clone() for name, part in parts.items()}


@devices
def test_a_checkpoint_of_the_cpu_goes_on_here(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_runs, "CPU", CPU)
    run = Run(steps=4)
    _, expected = run_on(run, tmp_path, CPU, monkeypatch)
    trainer, recorder = make_trainer(run, None, Processes(), tmp_path)
    recorder.stop_after = 2
    trainer.train()
    write_checkpoint(tmp_path, take_snapshot(trainer.weights, trainer.optimizer.parts(), trainer.state, copy=False))
    monkeypatch.setattr(layout_runs, "CPU", device)
    resumed, again = make_trainer(run, None, Processes(), tmp_path)
    resumed.resume(tmp_path / "checkpoint-2")
    resumed.train()
    assert differ(again.records, expected[2:]) <= 1e-4


def _in_8_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What 8 bits hold of a tensor, fp64."""
    wide = x.detach().cpu().float()
    scale = torch.finfo(dtype).max / wide.abs().max().double()
    return (wide * scale.float()).to(dtype).double() / scale.float().double()


@devices
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 2048])
def test_products_in_fp8_are_those_of_rounded_numbers(tokens: int, compiled: bool, device: torch.device) -> None:
    """O1's types: inputs bf16, weights fp32, outputs and their gradients bf16."""
    check_device(device)
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 192, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(128, 192, generator=generator).to(device).requires_grad_()
    grad = torch.randn(tokens, 128, generator=generator).to(device, torch.bfloat16) * 1e-6
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    product = torch.compile(fp8_product, backend=backend, fullgraph=True) if compiled else fp8_product
    y = product(x, weight, None)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    inputs, matrix = _in_8_bits(x, torch.float8_e4m3fn), _in_8_bits(weight, torch.float8_e4m3fn)
    gradient = _in_8_bits(grad, torch.float8_e5m2)
    pairs = [(y, inputs @ matrix.T), (x.grad, gradient @ matrix), (weight.grad, gradient.T @ inputs)]
    for found, expected in pairs:
        assert float((found.detach().cpu().double() - expected).norm() / expected.norm()) <= 2**-8


@devices
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_fp8_trains_as_bf16_does(level: str, lora: bool, device: torch.device, tmp_path: Path) -> None:
    """Four rows again and again: within the rounding of gradients to 2 bits, but not to the bit, as it is done in 8."""
    run = replace(FP8_RUN, precision=FP8_O2 | {"fp16_opt_level": level}, lora=lora, rows=4, steps=10)
    _, records = run_on(run, tmp_path, device)
    _, expected = run_on(replace(run, precision=HALF[f"bf16 {level}"]), tmp_path, device)
    assert 1e-4 < differ(records[:1], expected[:1]) <= 2**-4
    for record, other in zip(records, expected, strict=True):
        assert abs(record.loss - other.loss) <= 5e-2 * other.loss
    assert records[-1].loss < 0.9 * records[0].loss


@devices
@pytest.mark.parametrize("granularity", ["full", "core_attn"])
def test_fp8_computed_again_is_the_same(granularity: str, device: torch.device, tmp_path: Path) -> None:
    again = {"recompute": True, "recompute_granularity": granularity}
    records = run_on(replace(FP8_RUN, precision=FP8_O2 | again), tmp_path, device)[1]
    # a GPU adds the embedding's gradients up in any order, and what that changes may be rounded otherwise
    assert differ(records, run_on(FP8_RUN, tmp_path, device)[1]) <= (0.0 if device.type == "cpu" else 1e-2)


@devices
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp8_compiled_is_the_same(recompute: bool, packed: bool, device: torch.device, tmp_path: Path) -> None:
    """On the CPU to the bit; inductor rounds less in between, which moves some numbers to another one of 8 bits."""
    run = replace(FP8_RUN, precision=FP8_O2 | {"recompute": recompute}, packed=packed, compiled=True, steps=2)
    if device.type == "cuda":
        records = run_on(run, tmp_path, device)[1]
    else:
        with compiler(run):
            records = run_on(run, tmp_path, device)[1]
    expected = run_on(replace(run, compiled=False), tmp_path, device)[1]
    assert differ(records, expected) <= (1e-6 if device.type == "cpu" else 2**-4)


@devices
def test_fp8_goes_on_from_its_checkpoint(device: torch.device, tmp_path: Path) -> None:
    """Which holds bf16 weights and no scales: a run in bf16 could go on from it too."""
    run = replace(FP8_RUN, steps=4)
    straight, recorder = make_trainer(run, None, Processes(), tmp_path)
    recorder.stop_after = 2
    straight.train()
    write_checkpoint(tmp_path, take_snapshot(straight.weights, straight.optimizer.parts(), straight.state, copy=True))
    plain, _ = make_trainer(replace(run, precision=HALF["bf16 O2"]), None, Processes(), tmp_path)
    resumed, again = make_trainer(run, None, Processes(), tmp_path)
    for trainer in (plain, resumed):
        trainer.resume(tmp_path / "checkpoint-2")
        assert _state(trainer).keys() == _state(straight).keys()
        for name, tensor in _state(trainer).items():
            assert torch.equal(tensor, _state(straight)[name]), name
    recorder.stop_after, straight.should_stop = None, False
    straight.train()
    resumed.train()
    assert differ(again.records, recorder.records[2:]) <= (0.0 if device.type == "cpu" else 2e-2)


@devices
def test_fp8_tells_a_weight_that_is_not_finite(device: torch.device, tmp_path: Path) -> None:
    trainer, _ = make_trainer(FP8_RUN, None, Processes(), tmp_path)
    with torch.no_grad():
        dict(trainer.model.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    with pytest.raises(TrainingError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight"):
        trainer.step()
