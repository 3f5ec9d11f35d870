"""A trained model that is asked with the prompts of another task than it was trained for: one line says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]
TINY = "__internal_testing__/tiny-random-llama"
MODEL = ("--model_name_or_path", TINY, "--device", "cpu")


def warnings(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.splitlines() if "warning" in line]


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    answers = [{"text": "1937", "answer_start": 21}]
    questions = [{"id": str(i), "question": "When did it open?", "answers": answers} for i in range(2)]
    paragraph = {"context": "The bridge opened in 1937.", "qas": questions}
    document = {"version": "1.1", "data": [{"title": "Bridge", "paragraphs": [paragraph]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_the_task_of_the_run_is_compared(in_process: Command, squad: Path, tmp_path: Path) -> None:
    train = ("--dataset_path", str(squad), "--task_name", "squad_qa", "--max_steps", "1", "--save_steps", "1")
    assert not warnings(in_process("finetune", *MODEL, *train, "--lora", "--output_dir", "run"))
    run = tmp_path / "run"
    assert "\ntask_name: squad_qa\n" in (run / "config.yaml").read_text(encoding="utf-8")
    ask = ("predict", *MODEL, "--predict_file", "answers.jsonl", "--max_new_tokens", "1")
    rows = ("--data_file", str(squad))
    for folder in ("run", "run/checkpoint-1"):
        said = warnings(in_process(*ask, *rows, "--lora_path", folder))
        assert said == [
            f"arriero: warning: {folder} was trained with --task_name squad_qa and is asked with the prompts of squad: "
            "add --task_name squad_qa"
        ]
        prompts = [json.loads(line)["src"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert prompts == ["answer: 1937 context: The bridge opened in 1937."] * 2
    said = warnings(in_process(*ask, "--lora_path", "run"))
    assert said[0].endswith("add --data_file FILE --task_name squad_qa")
    score = ("evaluate", *MODEL, "--dataset_path", str(squad), "--lora_path", "run")
    assert len(warnings(in_process(*score))) == 1

    # the task of the run, rows that say themselves what is asked, and no adapter
    assert not warnings(in_process(*ask, *rows, "--task_name", "squad_qa", "--lora_path", "run"))
    assert "Question: When did it open?" in json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])["src"]
    assert not warnings(in_process(*score, "--task_name", "squad_qa"))
    (tmp_path / "rows.jsonl").write_text('{"src": "When?", "tgt": "1937"}\n', encoding="utf-8")
    assert not warnings(in_process(*ask, "--data_file", "rows.jsonl", "--lora_path", "run"))
    assert not warnings(in_process(*ask, *rows))

    # what cannot be read says nothing
    for content in (b"\xff\x00", b"- a list", b"task_name: [squad_qa]", b"task_name: another"):
        (run / "config.yaml").write_bytes(content)
        assert not warnings(in_process(*ask, *rows, "--lora_path", "run"))
    (run / "config.yaml").unlink()
    assert not warnings(in_process(*ask, *rows, "--lora_path", "run"))


def test_a_run_of_all_weights_is_compared_too(in_process: Command, squad: Path, tmp_path: Path) -> None:
    train = ("--dataset_path", str(squad), "--task_name", "squad", "--max_steps", "1", "--save_strategy", "no")
    warnings(in_process("finetune", *MODEL, *train, "--output_dir", "run"))
    ask = ("predict", "--device", "cpu", "--data_file", str(squad), "--predict_file", "answers.jsonl")
    ask += ("--max_new_tokens", "1", "--model_name_or_path")
    (said,) = warnings(in_process(*ask, "run", "--task_name", "squad_qa"))
    assert "run was trained with --task_name squad and is asked with the prompts of squad_qa" in said
    assert not warnings(in_process(*ask, "run"))  # question generation is what these rows are without the option
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("config.yaml"))
    assert not warnings(in_process(*ask, "copy", "--task_name", "squad_qa"))
