"""The first commands of a newcomer, one after the other: each names the next, which works as it is printed."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = "__internal_testing__/tiny-random-llama"
Command = Callable[..., subprocess.CompletedProcess[str]]
ASK = ("--prompt", "hi", "--max_new_tokens", "2", "--device", "cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "my_data"
    folder.mkdir()
    for name in ("train", "dev"):
        lines = [{"instruction": f"Load {i} is for", "output": f"house {i % 7}"} for i in range(8)]
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"messages": turns}])
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def next_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    start, _, command = result.stdout.splitlines()[-1].partition("try it: arriero ")
    assert start == ""
    return shlex.split(command)


def test_each_verb_names_a_command_that_works(in_process: Command, rows: Path, tmp_path: Path) -> None:
    train = ("--dataset_path", str(rows), "--max_steps", "1", "--device", "cpu")
    tuned = next_of(in_process("finetune", "--model_name_or_path", TINY, *train, "--output_dir", "runs/mine", "--lora"))
    assert tuned == ["chat", "--lora_path", "runs/mine"]
    assert in_process(*tuned, *ASK).returncode == 0
    merged = next_of(in_process("merge", "--lora_path", "runs/mine", "--output_path", "models/my own"))
    assert in_process(*merged, *ASK).returncode == 0
    small = next_of(in_process("quantize", "models/my own", "--output_path", "models/int8", "--quant_type", "int8"))
    assert in_process(*small, *ASK).returncode == 0
    made = next_of(in_process("export", "models/my own", "--output_path", "inf/mine"))
    assert in_process(*made, *ASK).returncode == 0
    (tmp_path / "text.txt").write_text("The mule carried a load over the hill.\n\n" * 200)
    text = ("--input_path", "text.txt", "--output_prefix", "data/text", "--append_eos")
    corpus = next_of(in_process("preprocess", "--model_name_or_path", TINY, *text))
    short = ("--max_steps", "1", "--max_seq_length", "32", "--device", "cpu")
    scratch = next_of(in_process(*corpus, *short))
    assert scratch == ["chat", "runs/scratch"]
    assert in_process(*scratch, *ASK).returncode == 0
    scored = in_process(
        "finetune", "--model_name_or_path", TINY, *train, "--output_dir", "runs/no", "--do_train", "no", "--do_eval"
    )
    assert "try it" not in scored.stdout, "nothing was trained"


def test_the_rate_of_a_run_is_told_and_kept(in_process: Command, rows: Path, tmp_path: Path) -> None:
    train = ("--dataset_path", str(rows), "--max_steps", "1", "--device", "cpu", "--model_name_or_path", TINY)
    run = in_process("finetune", *train, "--output_dir", "runs/mine", "--lora")
    assert "1 step of 8 x 1 rows, learning rate 0.0003, float32" in run.stdout
    assert "\nlearning_rate: 0.0003\n" in (tmp_path / "runs/mine/config.yaml").read_text()


def test_a_preview_says_what_the_run_would_say_of_its_rows(in_process: Command, rows: Path) -> None:
    common = (
        "finetune",
        "--model_name_or_path",
        TINY,
        "--dataset_path",
        str(rows),
        "--output_dir",
        "x",
        "--preview",
        "1",
    )
    lines = in_process(*common).stdout.splitlines()
    assert lines[-3:] == [
        "rows by format: 8 instruction, 1 messages",
        "8 rows are bare text, while chat and serve ask through the model's chat template: rows with `messages` use it too, "
        "and those with `instruction` by --data_format alpaca",
        "1 of 9 training rows; nothing was trained",
    ]
    shown = in_process(*common, "--data_format", "alpaca")
    assert shown.returncode == 2, "messages are no instructions"


def test_no_bar_is_drawn_where_there_is_no_terminal(arriero: Command, rows: Path) -> None:
    where = ("--model_name_or_path", TINY, "--device", "cpu")
    for command in (
        ("evaluate", *where, "--dataset_path", str(rows), "--eval_with_do_generation"),
        ("predict", *where, "--data_file", str(rows / "dev.jsonl"), "--max_new_tokens", "1"),
    ):
        done = arriero(*command)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", command[0]
