"""Answers generated between the steps of every kind of method on a pipeline, and from what it wrote: those of one process.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import append, read_lines, run_ranks
from test_methods import LORA, PP, PREFIX, prepare

from arriero.cli import main as arriero
from arriero.config.precision import PrecisionOptions
from arriero.training import generation_metrics, scoring
from arriero.training.callbacks.records import LossPlot
from arriero.training.trainer import StepRecord, Trainer

# method: its options of finetune, and which option of evaluate names what it wrote
METHODS: dict[str, tuple[list[str], str]] = {
    "full": ([], "--model_name_or_path"),
    "LoRA": (LORA, "--lora_path"),
    "DoRA": ([*LORA, "--lora_dora"], "--lora_path"),
    "prefix": (PREFIX, "--prefix_path"),
    "prefix, projection": ([*PREFIX, "--prefix_projection"], "--prefix_path"),
    "QAT W4": (["--qat", "--qat_type", "W4"], "--model_name_or_path"),
    "LoRA, QAT A8W8": ([*LORA, "--qat", "--qat_type", "A8W8"], "--lora_path"),
}
FEW = ("LoRA", "prefix", "QAT W4")


def run(method: str, layout: list[str], output: Path) -> dict[str, Any]:
    """Losses of two steps, and the answers after one of them, after the last, and from what was written."""
    own, names_it = METHODS[method]
    answers: list[list[str]] = []
    records: list[StepRecord] = []
    step, score = Trainer.step, generation_metrics.score

    def watched(trainer: Trainer) -> StepRecord:
        records.append(step(trainer))
        return records[-1]

    def looked_at(made: list[generation_metrics.Answer]) -> dict[str, float]:
        answers.append([answer.text for answer in made])
        return score(made)

    common = ["--dataset_path", "data", "--src_length", "64", "--tgt_length", "12", "--device", "cpu"]
    common += ["--eval_with_do_generation", "--per_device_eval_batch_size", "3", *layout]
    train = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    train += ["--learning_rate", "2e-2", "--adam_epsilon", "1e-5", "--do_eval", "--evaluation_strategy", "steps"]
    train += ["--eval_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm"]
    evaluated = {"--model_name_or_path": "model", names_it: str(output)}
    # inputs that are rounded go either way by their last bit, see test_methods.py
    wide = "float64" if "A8" in method else "float32"
    with (
        mock.patch.object(Trainer, "step", watched),
        mock.patch.object(generation_metrics, "score", looked_at),
        mock.patch.object(scoring, "score", looked_at),
        mock.patch("arriero.training.run.stop"),
        mock.patch.object(scoring, "stop"),
        mock.patch.object(LossPlot, "on_train_end"),
        mock.patch.object(PrecisionOptions, "weight_dtype", wide),
    ):
        train_it = ["finetune", "--model_name_or_path", "model", *own, *common, *train, "--output_dir", str(output)]
        evaluate = ["evaluate", *(word for pair in evaluated.items() for word in pair), *common]
        codes = [arriero(train_it), arriero(evaluate)]
    return {"codes": codes, "losses": [record.loss for record in records], "answers": answers}


def main(folder: Path, methods: list[str]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    layout = PP if os.environ["WORLD_SIZE"] == "2" else []
    for method in methods:
        found = run(method, layout, Path("pipeline" if layout else "alone") / method)
        append(Path("results.jsonl"), {"method": method, "rank": os.environ["RANK"], "pipeline": bool(layout), **found})


def check(methods: list[str], folder: Path) -> None:
    prepare(folder)
    (folder / "data").mkdir()
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "train.jsonl").write_text("".join(rows[:32]))
    (folder / "data" / "dev.jsonl").write_text("".join(rows[33:]))
    for world in (1, 2):
        run_ranks(world, Path(__file__), str(folder), *methods, timeout=500)
    lines = read_lines(folder / "results.jsonl")
    for method in methods:
        one, *ranks = [line for line in lines if line["method"] == method]
        assert len(ranks) == 2
        assert one["codes"] == [0, 0]
        assert [len(made) for made in one["answers"]] == [7, 7, 7], "after one step, after two, by evaluate"
        assert len(set(map(str, one["answers"]))) > 1, "training changes what is said"
        if "A8" not in method:  # evaluate computes in fp32
            assert one["answers"][1] == one["answers"][2], "what was written says the same"
        assert any(one["answers"][-1])
        for line in ranks:
            assert line["codes"] == [0, 0]
            assert line["losses"] == pytest.approx(one["losses"], rel=1e-5), method
            assert line["answers"] == one["answers"], method


@pytest.mark.timeout(500)
def test_a_pipeline_answers_as_one_process(tmp_path: Path) -> None:
    check(list(FEW), tmp_path)


@pytest.mark.peers
@pytest.mark.timeout(900)
def test_a_pipeline_answers_as_one_process_by_every_method(tmp_path: Path) -> None:
    check(list(METHODS), tmp_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
