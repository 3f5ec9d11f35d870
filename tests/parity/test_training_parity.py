"""Loss, schedule, optimizer and the whole loop against torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import FinetuningSteps
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training import loss as loss_module
from arriero.training.loss import linear_cross_entropy
from arriero.training.objectives.cross_entropy import CrossEntropy
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import FullWeights

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
V, H = 37, 16


def problem(dtype: torch.dtype = torch.float32, rows: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (1, rows, H), a head (V, H) and labels with every third one ignored."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, rows, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * 0.5).to(dtype)
    labels = torch.randint(V, (1, rows), generator=generator)
    labels[0, ::3] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 1), (4, 3), (5, 2), (1000, 4), (1000, 1000)])
def test_chunked_loss_equals_torch(
    smoothing: float, chunk_rows: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_rows * V)
    monkeypatch.setattr(loss_module, "BLOCK_ELEMENTS", block_rows * V)
    hidden, weight, labels = problem()
    sums = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
    (sums.loss * 0.37).backward()
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = h @ w.T
    flat = (logits.reshape(-1, V), labels.reshape(-1))
    expected = F.cross_entropy(*flat, ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    (expected * 0.37).backward()
    assert sums.tokens == int((labels != -100).sum()) == 15
    torch.testing.assert_close(sums.loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-5, atol=1e-6)
    kept = labels.reshape(-1) != -100
    assert int(sums.correct) == int((flat[0].argmax(1) == flat[1])[kept].sum())
    assert not hidden.grad[0, ::3].any(), "ignored positions have no gradient"


def test_gradients_of_two_passes_over_one_graph_are_the_same() -> None:
    """As pipelines without bubbles make them."""
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels).loss * 0.37
    first = torch.autograd.grad(loss, (hidden,), retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    assert torch.equal(first, second[0])
    for one, other in zip(second, third, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 1), (1, 1), (682, 682), (683, 384), (1024, 512), (1025, 576), (1280, 640), (2048, 512), (100_000, 640)],
)
def test_rows_of_a_chunk_are_even_shares_in_whole_tiles(rows: int, expected: int) -> None:
    assert loss_module.chunk_rows(rows, 49_152) == expected


def test_rows_of_a_chunk_fit_whatever_the_vocabulary() -> None:
    for vocabulary in (1, 37, 32_000, 128_256, 262_144, 1 << 23, 1 << 30):
        for rows in (0, 1, 3, 5, 63, 64, 65, 127, 129, 1000, 4097):
            chunk = loss_module.chunk_rows(rows, vocabulary)
            assert chunk == 1 or 1 <= chunk * vocabulary <= loss_module.CHUNK_ELEMENTS


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_bf16_loss_is_as_good_as_torchs(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_rows * V)
    hidden, weight, labels = problem(torch.bfloat16)
    sums = linear_cross_entropy(hidden, weight, labels)
    (sums.loss / sums.tokens).backward()
    h, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    exact = F.cross_entropy((h @ w.T).reshape(-1, V), labels.reshape(-1), ignore_index=-100)
    exact.backward()
    assert sums.loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert float(sums.loss) / sums.tokens == pytest.approx(float(exact), rel=5e-3)
    for mine, true in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert float((mine.float() - true).norm() / true.norm()) < 1e-2


def test_loss_under_autocast_and_with_a_frozen_head() -> None:
    hidden, weight, labels = problem()
    weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = linear_cross_entropy(hidden, weight, labels)
    sums.loss.backward()
    h = hidden.detach().clone().requires_grad_()
    exact = F.cross_entropy((h @ weight.T).reshape(-1, V), labels.reshape(-1), ignore_index=-100, reduction="sum")
    exact.backward()
    assert weight.grad is None
    assert hidden.grad.dtype == torch.float32
    assert float(sums.loss) == pytest.approx(float(exact), rel=1e-2)
    assert float((hidden.grad - h.grad).norm() / h.grad.norm()) < 2e-2


def test_no_label_is_a_zero_loss() -> None:
    hidden, weight, labels = problem()
    sums = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE))
    sums.loss.backward()
    assert (float(sums.loss), int(sums.correct), sums.tokens) == (0.0, 0, 0)
    assert not hidden.grad.any()


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "constant"])
def test_schedule_equals_transformers(kind: str, warmup: int) -> None:
    total, peak = 29, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if kind == "constant":
        warmup = 0
    theirs: Any = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = Schedule(kind, peak, 0.0, warmup, total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_schedule_floor_and_refusals() -> None:
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind, 1.0, 0.25, 2, 10)
        assert [schedule(s) for s in (0, 1, 2)] == [0.0, 0.5, 1.0]
        assert schedule(6) == pytest.approx(0.625)  # half way between the peak and the floor
        assert [schedule(s) for s in (10, 11, 500)] == [0.25] * 3
    with pytest.raises(ConfigError, match="nan"):
        Schedule("linear", float("nan"), 0.0, 0, 1)
    with pytest.raises(ConfigError, match="above"):
        Schedule("linear", 1e-5, 1e-4, 0, 1)
    with pytest.raises(ConfigError, match="triangle"):
        Schedule("triangle", 1.0, 0.0, 0, 1)


SHAPE: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LEARNING_RATE, DECAY, CLIP, STEPS, WARMUP = 3e-3, 0.1, 0.5, 5, 2


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(8)
    made = []
    for length in (9, 4, 13, 6, 11, 5, 8):
        ids = torch.randint(3, 53, (length,), generator=generator).tolist()
        prompt = length // 2
        made.append(Example(ids, [IGNORE] * (prompt - 1) + ids[prompt:] + [IGNORE]))
    return made


class Records(Callback):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_whole_loop_equals_an_independent_one(tied: bool, smoothing: float, tmp_path: Path) -> None:
    shape = {**SHAPE, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = LlamaForCausalLM(LlamaConfig.from_dict({**shape, "model_type": "llama"}))
    ours.load_state_dict(theirs.state_dict(), strict=not tied)
    ours.tie_weights()
    order = StepOrder(7, 2, 2, seed=3)
    records = Records()
    trainer = Trainer(
        model=ours,
        data=FinetuningSteps(rows(), order),
        optimizer=Optimizer(ours, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY),
        schedule=Schedule("linear", LEARNING_RATE, 0.0, WARMUP, STEPS),
        precision=Precision(torch.float32, "O1", CPU),
        weights=FullWeights(ours, tmp_path),
        total_steps=STEPS,
        run_folder=tmp_path,
        device=CPU,
        max_grad_norm=CLIP,
        objective=CrossEntropy(smoothing),
        callbacks=[records],
    )
    trainer.train()

    # the independent loop: padding, attention mask, transformers' forward, torch's AdamW and clipping, HF's warm-up
    examples = rows()
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    warm = transformers.get_linear_schedule_with_warmup(adamw, WARMUP, STEPS)
    theirs.train()
    losses, norms = [], []
    for step in range(STEPS):
        chosen = [examples[i] for micro in order(step) for i in micro]
        longest = max(example.length for example in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask, labels = ids.clone(), torch.full_like(ids, -100)
        for i, example in enumerate(chosen):
            ids[i, : example.length] = torch.tensor(example.input_ids)
            mask[i, : example.length] = 1
            prompt = example.length // 2
            labels[i, prompt : example.length] = torch.tensor(example.input_ids[prompt:])
        logits = theirs(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, 53), labels[:, 1:].reshape(-1), ignore_index=-100, label_smoothing=smoothing
        )
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)))
        adamw.step()
        warm.step()
        adamw.zero_grad()
        losses.append(float(loss))

    assert [record.loss for record in records.records] == pytest.approx(losses, abs=1e-5)
    assert [record.grad_norm for record in records.records] == pytest.approx(norms, abs=1e-4)
    assert max(norms) > CLIP, "the clipping must have had something to do"
    assert losses[-1] < losses[0]
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert float((parameter - other[name]).detach().abs().max()) <= 1e-5, name
