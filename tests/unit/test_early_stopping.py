"""Early stopping: where transformers would stop, also after a resume, and with the best weights at the end."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from arriero.cli import main as arriero
from arriero.config.checkpoint import CheckpointOptions
from arriero.errors import TrainingError
from arriero.formats.safe_tensors import read_tensors
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.early_stopping import EarlyStopping
from arriero.training.callbacks.evaluation import Evaluation

sys.path.insert(0, str(Path(__file__).parent))
from test_run_endings import make_trainer, scores

SERIES = {
    "slow creep": [5.0, 4.95, 4.9, 4.85, 4.0, 3.99],
    "up and down": [3.0, 2.0, 2.5, 1.9, 2.0, 2.1],
    "never": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "always": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    "equal": [1.0, 1.0, 1.0, 0.5, 0.5, 0.5],
}


def stops_in_transformers(values: list[float], patience: int, threshold: float, greater: bool, folder: Path) -> int:
    arguments = TrainingArguments(
        output_dir=str(folder), metric_for_best_model="eval_loss", greater_is_better=greater, eval_strategy="steps"
    )
    callback, state = EarlyStoppingCallback(patience, threshold), TrainerState()
    for number, value in enumerate(values, 1):
        control = TrainerControl()
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        if control.should_training_stop:
            return number
        # the trainer's own step after the callbacks: `Trainer._determine_best_metric`
        if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
            state.best_metric = value
    return len(values)


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.08])
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("series", SERIES)
def test_stops_where_transformers_does(
    series: str, patience: int, threshold: float, greater: bool, tmp_path: Path
) -> None:
    values = SERIES[series]
    stopping = EarlyStopping(patience, "loss", threshold=threshold, greater_is_better=greater)
    trainer = make_trainer(tmp_path, Evaluation(scores(*values), "steps", 1), stopping)
    assert trainer.train().step == stops_in_transformers(values, patience, threshold, greater, tmp_path)


def callbacks(values: list[float], patience: int = 2) -> list[Any]:
    return [
        Evaluation(scores(*values), "steps", 1),
        EarlyStopping(patience, "loss"),
        Checkpointing("steps", 1, metric="loss", load_best=True),
    ]


def test_a_resumed_run_stops_where_the_whole_run_does_and_ends_with_the_best(tmp_path: Path) -> None:
    values = [3.0, 2.0, 2.5, 2.6, 1.0, 0.5]
    whole = make_trainer(tmp_path / "whole", *callbacks(values))
    assert whole.train().step == 4
    assert whole.stopped_early
    assert whole.state.best_checkpoint == "checkpoint-2"
    stored = dict(read_tensors(tmp_path / "whole" / "checkpoint-2" / "model.safetensors"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name

    for stop in (1, 3):
        folder = tmp_path / "whole"
        resumed = make_trainer(folder, *callbacks(values[stop:]))
        resumed.resume(folder / f"checkpoint-{stop}")
        assert resumed.train().step == 4
    done = make_trainer(tmp_path / "whole", *callbacks([]))  # nothing is left to do
    done.resume(tmp_path / "whole" / "checkpoint-4")
    assert done.train().step == 4
    assert done.stopped_early
    patient = make_trainer(tmp_path / "whole", *callbacks(values[4:], patience=3))
    patient.resume(tmp_path / "whole" / "checkpoint-4")
    assert patient.train().step == 6
    assert not patient.stopped_early


def test_a_checkpoint_is_written_where_it_stops(tmp_path: Path) -> None:
    values = [1.0, 2.0, 3.0]
    made = [Evaluation(scores(*values), "steps", 1), EarlyStopping(1, "loss"), Checkpointing("steps", 5)]
    assert make_trainer(tmp_path, *made).train().step == 2
    assert (tmp_path / "checkpoint-2").is_dir()


def test_what_is_no_number_is_no_gain(tmp_path: Path) -> None:
    values = [math.nan, 2.0, math.nan, math.nan, 1.0, 1.0]
    trainer = make_trainer(tmp_path, Evaluation(scores(*values), "steps", 1), EarlyStopping(2, "loss"))
    assert trainer.train().step == 4
    assert trainer.state.best_watched == 2.0


@pytest.mark.parametrize(
    ("patience", "threshold", "told"),
    [
        (1, 0.0, "1 evaluation without a better loss (best 1.0000)"),
        (2, 0.5, "2 evaluations without a better loss (best 0.8000; better: by more than 0.5)"),
    ],
)
def test_the_message_counts_and_names_the_threshold(
    patience: int, threshold: float, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [1.0, 2.0, 0.8] if threshold else [1.0, 2.0]
    stopping = EarlyStopping(patience, "loss", threshold=threshold)
    make_trainer(tmp_path, Evaluation(scores(*values), "steps", 1), stopping).train()
    assert capsys.readouterr().out.endswith(f"{told}\n")


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Evaluation(scores(1.0), "steps", 1), EarlyStopping(2, "bleu"))
    with pytest.raises(TrainingError, match="metric_for_best_model 'bleu' is not computed here: one of loss"):
        trainer.train()


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = CheckpointOptions(output_dir="x", early_stopping_patience=2, metric_for_best_model="eval_accuracy")
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("accuracy", True)
    chosen = CheckpointOptions(output_dir="x", early_stopping_patience=2)
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("loss", False)
    run = ["finetune", "--model_name_or_path", "m", "--dataset_path", "d", "--output_dir", "x"]
    assert arriero([*run, "--early_stopping_patience", "2"]) == 2
    assert "--early_stopping_patience needs evaluations" in capsys.readouterr().err
    assert arriero([*run, "--early_stopping_patience", "0", "--do_eval"]) == 2
