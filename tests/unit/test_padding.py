"""Rows packed, padded, or packed by tokens: the same loss, the same gradients, the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arriero.data.batch import Batch, pack, pad
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import FinetuningSteps
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.execution import DirectExecution, Layers
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import Trainer
from arriero.training.weights import FullWeights

CPU = torch.device("cpu")
PRECISION = Precision(torch.float32, "O1", CPU)


def make_model() -> LlamaForCausalLM:
    shape = {
        "model_type": "llama",
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape))
    model.init_weights(0)
    return model


def make_rows(count: int = 12) -> list[Example]:
    """Rows of 4 to 34 tokens; some begin alike."""
    generator = torch.Generator().manual_seed(8)
    beginning = torch.randint(3, 53, (18,), generator=generator).tolist()
    rows = []
    for i in range(count):
        ids = torch.randint(3, 53, (4 + 5 * (i % 4),), generator=generator).tolist()
        prompt = beginning if i % 3 == 0 else ids[:1]
        rows.append(Example(prompt + ids, [IGNORE] * len(prompt) + ids[1:] + [IGNORE]))
    return rows


def mean_loss(batches: list[Batch], model: LlamaForCausalLM) -> float:
    sums = DirectExecution(Layers(model, PRECISION, CPU)).score(batches)
    return sums.loss / sum(batch.label_tokens for batch in batches)


def test_the_loss_of_a_token_is_the_same() -> None:
    rows, model = make_rows(), make_model()
    alone = mean_loss([pack([row]) for row in rows], model)
    assert mean_loss([pack(rows)], model) == pytest.approx(alone, rel=1e-6)
    assert mean_loss([pad(rows)], model) == pytest.approx(alone, rel=1e-6)
    assert mean_loss([pad(rows[:5]), pack(rows[5:], share_prefixes=True)], model) == pytest.approx(alone, rel=1e-6)


def test_what_padding_holds_changes_nothing() -> None:
    rows, model = make_rows(), make_model()
    batch = pad(rows)
    real = batch.real()
    assert real is not None
    other = Batch(
        torch.where(real, batch.input_ids, 7),
        batch.labels,
        batch.parts,
        batch.rows,
        batch.row_tokens,
        batch.label_tokens,
    )
    assert mean_loss([other], model) == mean_loss([batch], model)


def trained(folder: Path, data: FinetuningSteps, steps: int = 6) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = make_model()
    trainer = Trainer(
        model=model,
        data=data,
        optimizer=Optimizer(model, weight_decay=0.01),
        schedule=Schedule("constant", 5e-3, 0.0, 0, steps),
        precision=PRECISION,
        weights=FullWeights(model, folder),
        total_steps=steps,
        run_folder=folder,
        device=CPU,
    )
    losses = [trainer.step().loss for _ in range(steps)]
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_training_is_the_same(tmp_path: Path) -> None:
    rows = make_rows()
    lengths = [row.length for row in rows]
    packed = trained(tmp_path, FinetuningSteps(rows, StepOrder(12, 2, 2, 5)))
    by_tokens = StepOrder(12, 2, 2, 5, lengths=lengths, max_tokens=max(lengths) + 8)
    assert len(by_tokens(0)) != 2 or any(len(batch) != 2 for batch in by_tokens(0))
    ways = [
        FinetuningSteps(rows, StepOrder(12, 2, 2, 5), padded=True),
        FinetuningSteps(rows, by_tokens),
        FinetuningSteps(rows, by_tokens, share_prefixes=True),
    ]
    for data in ways:
        losses, weights = trained(tmp_path, data)
        assert losses == pytest.approx(packed[0], rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, packed[1][name], rtol=1e-4, atol=2e-6)
