"""Preference training through the real command line, on the tiny model: trained, resumed, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_command

from arriero.cli import main

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

TINY = "__internal_testing__/tiny-random-llama"
# what is preferred is a number in figures: something to learn that every pair shows
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS = [
    {"prompt": f"write the number {word} for me, and nothing else", "chosen": str(number), "rejected": word}
    for number, word in enumerate(WORDS, 1)
]
TRAINING = (
    *("--model_name_or_path", TINY, "--dataset_path", "data", "--src_length", "64", "--max_steps", "6"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"),
    *("--lr_scheduler_type", "constant", "--do_eval", "--evaluation_strategy", "steps", "--save_strategy", "steps"),
    *("--save_steps", "3", "--logging_steps", "1", "--disable_tqdm", "True", "--report_to", "none"),
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_rows(folder / "data" / "train.jsonl", ROWS)
    write_rows(folder / "data" / "dev.jsonl", ROWS[:5])
    write_rows(folder / "missing" / "train.jsonl", [ROWS[0], {"prompt": "a", "chosen": "b"}])
    write_rows(folder / "missing" / "dev.jsonl", ROWS[:1])
    return folder


@pytest.fixture(scope="module")
def cli(work: Path) -> Command:
    def call(*arguments: str) -> Result:
        environment = {**os.environ, "ARRIERO_HOME": str(work / "home"), "COLUMNS": "100"}
        return run_command("finetune", *arguments, cwd=work, env=environment)

    return call


@pytest.fixture(scope="module")
def trained(work: Path, cli: Command) -> Path:
    result = cli(*TRAINING, "--preference", "dpo", "--lora", "--output_dir", "dpo")
    assert result.returncode == 0, result.stderr
    assert "8 pairs scored by the reference" in result.stdout
    assert "reward accuracy" in result.stdout
    return work / "dpo"


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_dpo_learns_what_is_preferred(trained: Path) -> None:
    steps = [record for record in log(trained) if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # log 2: the model is its own reference at first
    assert steps[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["loss"] < 0.6
    scores = json.loads((trained / "all_results.json").read_text(encoding="utf-8"))
    assert scores["eval_reward_accuracy"] == 1.0
    assert scores["eval_reward_margin"] > 0.2
    kept = load_file(trained / "reference_logps.safetensors")
    assert {split: tuple(values.shape) for split, values in kept.items()} == {"train": (8, 2), "dev": (5, 2)}
    assert all((values < 0).all() for values in kept.values())


def test_a_resumed_run_goes_on_with_its_reference(trained: Path, work: Path, cli: Command) -> None:
    arguments = (*TRAINING, "--preference", "dpo", "--lora", "--output_dir", "again")
    result = cli(*arguments, "--resume_from_checkpoint", str(trained / "checkpoint-3"))
    assert result.returncode == 0, result.stderr
    assert "scored by the reference" not in result.stdout
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (trained, work / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preference", "dpo", "--eval_with_do_generation", "True"), "do not go together"),
        (("--loss_type", "kto"), "--preference takes one of dpo"),
        (("--preference", "dpo", "--dataset_path", "missing"), "train.jsonl:2: 'rejected' is missing"),
        (
            ("--preference", "dpo", "--load_best_model_at_end", "True", "--metric_for_best_model", "ppl"),
            "reward_accuracy",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...],
    message: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(work)
    assert main(["finetune", *TRAINING, "--output_dir", "refused", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
