"""Fine-tuning data through the real command line: a look at the rows, a mixture, padded rows and micro-batches by tokens."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.cli import main

TINY = "__internal_testing__/tiny-random-llama"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    turns = [
        {"role": "user", "content": "first \x1b[31m question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "second answer " * 20},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 6)
    (folder / "table.csv").write_text("src,tgt\n" + "".join(f"what follows {i}?,{i + 1}\n" for i in range(10)))
    return folder


def test_preview_shows_rows_and_does_nothing_else(in_process: Command, data: Path, tmp_path: Path) -> None:
    common = ("finetune", "--model_name_or_path", TINY, "--dataset_path", str(data / "chat.jsonl"), "--tgt_length", "8")
    result = in_process(*common, "--output_dir", "out", "--preview", "2")
    assert result.returncode == 0, result.stderr
    assert f"--- {data}/chat.jsonl:1, " in result.stdout
    assert "answer cut to fit tgt_length ---" in result.stdout
    assert "[[ first answer</s>]]" in result.stdout or "[[first answer</s>]]" in result.stdout
    assert "second question" in result.stdout
    assert "\x1b" not in result.stdout, "a row cannot steer the terminal"
    assert "\\x1b[31m" in result.stdout
    assert result.stdout.rstrip().endswith("2 of 6 training rows; nothing was trained")
    assert not list(tmp_path.rglob("out*"))
    coloured = in_process(
        *common, "--output_dir", "out", "--preview", "1", "--preview_color", "always", "--train_on", "last"
    )
    assert coloured.stdout.count("\x1b[32m") == 1, "only the last answer is learned"
    assert "\x1b[2m" in coloured.stdout
    assert "[[" not in coloured.stdout


def test_an_array_of_rows_as_alpaca_has_it(in_process: Command, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data.json"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!"} for i in range(4)]
    path.write_text(json.dumps(rows, indent=4))
    model = ("--model_name_or_path", TINY, "--device", "cpu")
    train = ("--dataset_path", str(path), "--data_format", "alpaca", "--max_steps", "1", "--output_dir", "run")
    result = in_process("finetune", *model, *train)
    assert result.returncode == 0, result.stderr
    asked = ("--data_file", str(path), "--predict_file", "answers.jsonl", "--max_new_tokens", "1")
    result = in_process("predict", *model, *asked)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4
    path.write_text(json.dumps([*rows, {"instruction": "Say 5."}], indent=4))
    result = in_process("finetune", *model, *train, "--overwrite_output_dir")
    assert result.returncode == 2
    assert f"{path}[4]: has no 'output'" in result.stderr


def test_a_mixture_padded_and_by_tokens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mixed = f"{data}/chat.jsonl:1,{data}/table.csv:3"
    common = ("finetune", "--model_name_or_path", TINY, "--dataset_path", mixed, "--max_steps", "3", "--lora")
    common += ("--per_device_train_batch_size", "4", "--disable_tqdm", "True", "--report_to", "none")
    common += ("--save_strategy", "no", "--logging_steps", "1")
    losses = {}
    for name, more in {
        "packed": (),
        "padded": ("--packing", "no"),
        "tokens": ("--max_tokens_per_batch", "600"),
    }.items():
        assert main([*common, *more, "--output_dir", name]) == 0
        shown = capsys.readouterr().out
        assert "chat.jsonl: 6 rows, 4 an epoch (25.0 %)" in shown
        assert "table.csv: 10 rows, 12 an epoch (75.0 %)" in shown
        lines = (tmp_path / name / "train_log.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses["packed"]) == 3
    assert losses["padded"] == pytest.approx(losses["packed"], rel=1e-5)
    assert losses["tokens"] == pytest.approx(losses["packed"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_tokens_per_batch", "8"), "--max_tokens_per_batch allows 8"),
        (("--data_format", "sharegpt"), "chat.jsonl:1: none of the keys conversations"),
        (("--dataset_weights", "0.5,0.5"), "--dataset_weights has 2 numbers and --dataset_path names 1"),
    ],
)
def test_a_wrong_choice_is_one_line(
    data: Path, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--dataset_path", str(data / "chat.jsonl"), "--output_dir", str(tmp_path / "out"))
    assert main(["finetune", "--model_name_or_path", TINY, *rows, *options]) == 2
    assert message in capsys.readouterr().err


def test_preview_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "2+2?", "chosen": "four", "rejected": "five"}) + "\n")
    data = ("--dataset_path", str(path), "--output_dir", str(tmp_path / "out"), "--preview", "3")
    assert main(["finetune", "--model_name_or_path", TINY, *data, "--preference", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "pair 1, chosen" in shown
    assert "four</s>]]" in shown
    assert "five</s>]]" in shown
    assert "1 of 1 training pairs; nothing was trained" in shown
