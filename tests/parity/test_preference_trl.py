"""Preference training against TRL: whole runs of its DPOTrainer, and the loss functions of its ORPO and CPO trainers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arriero.data.order import StepOrder
from arriero.data.pairs import Pair, PreferenceSteps, pair_batches
from arriero.data.sft import IGNORE, Example
from arriero.formats.download import resolve_model
from arriero.formats.hf import load_model
from arriero.training.execution import DirectExecution, Layers
from arriero.training.objectives.preference import Preference
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.preference_data import reference_log_probabilities
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import FullWeights

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")
pytestmark = pytest.mark.peers  # TRL alone takes half a minute to import

CPU = torch.device("cpu")
STEPS, LEARNING_RATE, CLIP, EPSILON = 4, 2e-3, 0.5, 1e-5
ROWS = [
    {"prompt": "Which number follows three? Answer in figures.", "chosen": " 4", "rejected": " four, I think"},
    {"prompt": "Which number follows nine?", "chosen": " 10 it is", "rejected": " ten"},
    {"prompt": "Say", "chosen": " something short", "rejected": " a word, and then another word, and so on"},
    {"prompt": "And the one after a hundred, if you please?", "chosen": " 101", "rejected": " one hundred and one"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)


class Records(Callback):
    def __init__(self) -> None:
        self.all: list[StepRecord] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.all.append(record)


def pair_of(row: dict[str, list[int]]) -> Pair:
    """From the token ids that TRL made."""
    examples = []
    for answer in (row["chosen_ids"], row["rejected_ids"]):
        ids = row["prompt_ids"] + answer
        examples.append(Example(ids, [IGNORE] * (len(row["prompt_ids"]) - 1) + answer + [IGNORE]))
    return Pair(*examples)


@pytest.mark.parametrize(("loss_type", "kind", "beta"), [("sigmoid", "dpo", 0.3), ("ipo", "ipo", 0.8)])
def test_a_run_is_that_of_dpo_trainer(loss_type: str, kind: str, beta: float, folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    peer = DPOTrainer(
        model=theirs,
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type=[loss_type],
            beta=beta,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_epsilon=EPSILON,
            weight_decay=0.01,
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    pairs = [pair_of(row) for row in peer.train_dataset]
    peer.train()
    told = [line for line in peer.state.log_history if "loss" in line]

    ours = load_model(folder, dtype=torch.float64)
    objective = Preference(kind, beta=beta)
    precision = Precision(torch.float64, "O1", CPU)
    execution = DirectExecution(Layers(ours, precision, CPU, objective))
    reference = reference_log_probabilities(execution, pair_batches(pairs, 2, share_prefixes=True), len(pairs), 2)
    records = Records()
    trainer = Trainer(
        model=ours,
        data=PreferenceSteps(pairs, StepOrder(len(pairs), 2, 2, 0), reference),  # all pairs in every step
        optimizer=Optimizer(ours, betas=(0.9, 0.999), eps=EPSILON, weight_decay=0.01),
        schedule=Schedule("constant", LEARNING_RATE, 0.0, 0, STEPS),
        precision=precision,
        weights=FullWeights(ours, folder),
        total_steps=STEPS,
        run_folder=tmp_path,
        device=CPU,
        max_grad_norm=CLIP,
        objective=objective,
        callbacks=[records],
    )
    trainer.train()

    assert len(told) == STEPS
    for line, record in zip(told, records.all, strict=True):
        assert record.loss == pytest.approx(float(line["loss"]), rel=1e-5)
        assert record.grad_norm == pytest.approx(float(line["grad_norm"]), rel=1e-5)
        assert record.metrics["reward_margin"] == pytest.approx(float(line["rewards/margins"]), rel=1e-4, abs=1e-6)
        if float(line["step"]) > 1:  # before that the model is the reference, and its margins are signs of rounding
            assert record.metrics["reward_accuracy"] == float(line["rewards/accuracies"])
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, float(error))


SUMS = torch.tensor([[-4.0, -9.0], [-2.0, -1.0], [-12.0, -3.0]])
LENGTHS = torch.tensor([[2.0, 3.0], [1.0, 1.0], [4.0, 2.0]])


def test_simpo_is_that_of_cpo_trainer() -> None:
    from trl.experimental.cpo import CPOTrainer

    peer: Any = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device=CPU),
    )
    means = SUMS / LENGTHS
    expected, *rewards = CPOTrainer.cpo_loss(peer, means[:, 0], means[:, 1])
    found, own = Preference("simpo", beta=2.0, gamma=0.7).losses(SUMS, LENGTHS, None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, torch.stack(rewards, dim=1))


def test_orpo_is_that_of_orpo_trainer() -> None:
    """Its odds ratio and rewards; its cross-entropy is of all tokens of a batch, prompts among them."""
    from trl.experimental.orpo import ORPOTrainer

    peer: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=CPU))
    means = SUMS / LENGTHS
    weighed, *rewards = ORPOTrainer.odds_ratio_loss(peer, means[:, 0], means[:, 1])[:3]
    found, own = Preference("orpo", odds_weight=0.4).losses(SUMS, LENGTHS, None)
    torch.testing.assert_close(found, -means[:, 0] - weighed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, torch.stack(rewards, dim=1))
