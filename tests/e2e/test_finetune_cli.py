"""The main job through the real command line, on the tiny model: fine-tune, resume, score, predict, merge, chat, quickstart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_command

from arriero.cli import main

transformers = pytest.importorskip("transformers")

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

OPTIMIZER = "optimizer/model.safetensors"
TINY = "__internal_testing__/tiny-random-llama"
ROWS = [{"src": f"what follows {i} ?", "tgt": str(i + 1)} for i in range(12)]
TRAINING = (
    *("--model_name_or_path", TINY, "--dataset_path", "data", "--do_eval", "--load_best_model_at_end", "True"),
    *("--save_strategy", "steps", "--save_steps", "3", "--evaluation_strategy", "steps", "--max_steps", "6"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "3e-3"),
    *("--lr_scheduler_type", "constant", "--disable_tqdm", "True", "--report_to", "none", "--src_length", "64"),
)


def same_tensors(one: Path, other: Path) -> bool:
    """To the bit; the files themselves need not be equal, as torch writes their notes in any order."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, shared by the tests of this file; models are kept in its `home`."""
    folder = tmp_path_factory.mktemp("work")
    write_rows(folder / "data" / "train.jsonl", ROWS)
    write_rows(folder / "data" / "dev.jsonl", ROWS[:5])
    return folder


@pytest.fixture(scope="module")
def cli(work: Path) -> Command:
    """The command line in `work`; the fixture `arriero` of conftest.py has a folder for one test only."""

    def call(*arguments: str) -> Result:
        environment = {**os.environ, "ARRIERO_HOME": str(work / "home"), "COLUMNS": "100"}
        result = run_command(*arguments, cwd=work, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    return call


@pytest.fixture(scope="module")
def full(work: Path, cli: Command) -> Path:
    cli("finetune", *TRAINING, "--output_dir", "full")
    return work / "full"


@pytest.fixture(scope="module")
def lora(work: Path, cli: Command) -> Path:
    cli("finetune", *TRAINING, "--lora", "--lora_rank", "4", "--lora_dropout", "0.1", "--output_dir", "lora")
    return work / "lora"


@pytest.fixture(scope="module")
def merged(work: Path, cli: Command, lora: Path) -> Path:
    result = cli("merge", "--model_name_or_path", TINY, "--lora_path", "lora", "--output_path", "merged")
    assert "merged model: merged" in result.stdout
    return work / "merged"


def oracle(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def oracle_scores(folder: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Loss and token accuracy of the answers, row by row with transformers."""
    model, tokenizer = oracle(folder)
    loss, right, count = 0.0, 0, 0
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(row["src"], add_special_tokens=False)]
        target = [*tokenizer.encode(" " + row["tgt"], add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss += float(F.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        right += int((logits.argmax(-1) == torch.tensor(target)).sum())
        count += len(target)
    return loss / count, right / count


@pytest.fixture
def refused(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a command is refused; in this process, which saves starting an interpreter for each."""

    def call(*arguments: str) -> str:
        monkeypatch.chdir(work)
        monkeypatch.setenv("ARRIERO_HOME", str(work / "home"))
        capsys.readouterr()
        code = main(list(arguments))
        return one_line(code, capsys.readouterr().err)

    return call


def one_line(code: int, stderr: str) -> str:
    """The only line of an error."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("arriero")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_full_fine_tuning_leaves_a_whole_run(full: Path) -> None:
    names = {path.name for path in full.iterdir()}
    expected = {"config.yaml", "train_log.jsonl", "all_results.json", "loss.png", "checkpoint-3", "checkpoint-6"}
    assert expected | {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith(".")], "nothing temporary stays"
    assert (full / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (full / "train_log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6]
    results = json.loads((full / "all_results.json").read_text())
    assert results["train_steps"] == 6
    best = min(record["eval_loss"] for record in records if "eval_loss" in record)
    assert results["eval_loss"] == pytest.approx(best, abs=1e-5), "the best checkpoint was put back"
    loss, accuracy = oracle_scores(full, ROWS[:5])
    assert results["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert results["eval_accuracy"] == pytest.approx(accuracy)


def test_a_used_folder_is_not_overwritten(full: Path, refused: Callable[..., str]) -> None:
    before = (full / "model.safetensors").read_bytes()
    message = refused("finetune", *TRAINING, "--output_dir", "full")
    assert "--output_dir full is not empty" in message
    assert "--overwrite_output_dir" in message
    assert "--resume_from_checkpoint auto" in message
    assert (full / "model.safetensors").read_bytes() == before


def test_another_method_leaves_nothing_of_the_one_before(work: Path, cli: Command) -> None:
    run, files = work / "methods", {False: {"config.json", "model.safetensors"}, True: {"adapter_config.json"}}
    short = ("finetune", *TRAINING, "--max_steps", "1", "--output_dir", "methods", "--overwrite_output_dir")
    run.mkdir()
    (run / "precious.safetensors").touch()
    for lora in (False, True, False):
        cli(*short, "--lora", str(lora))
        names = {path.name for path in run.iterdir()}
        assert files[lora] <= names
        assert not files[not lora] & names
        assert "generation_config.json" in names or lora
        assert "precious.safetensors" in names
        assert not [name for name in names if name.startswith(".")]
    transformers.AutoModelForCausalLM.from_pretrained(run)


def test_a_run_that_is_stopped_and_resumed_is_the_same_run(full: Path, work: Path, cli: Command) -> None:
    cli("finetune", *TRAINING, "--max_steps", "4", "--save_steps", "4", "--output_dir", "stopped")
    damaged = work / "stopped" / "checkpoint-99"
    damaged.mkdir()  # of a machine that lost its power
    result = cli("finetune", *TRAINING, "--output_dir", "stopped", "--resume_from_checkpoint", "auto")
    assert "warning: " in result.stdout
    assert "checkpoint-99" in result.stdout
    assert "resumed from stopped/checkpoint-4 at step 4" in result.stdout
    assert (work / "stopped" / "checkpoint-6" / "model.safetensors").read_bytes() == (
        full / "checkpoint-6" / "model.safetensors"
    ).read_bytes()
    assert same_tensors(work / "stopped" / "checkpoint-6" / OPTIMIZER, full / "checkpoint-6" / OPTIMIZER)


def test_the_configuration_of_a_run_reproduces_it(full: Path, work: Path, cli: Command) -> None:
    cli("finetune", "--config", "full/config.yaml", "--output_dir", "again")
    for name in ("model.safetensors", "config.json"):
        assert (work / "again" / name).read_bytes() == (full / name).read_bytes(), name
    assert same_tensors(work / "again" / "checkpoint-3" / OPTIMIZER, full / "checkpoint-3" / OPTIMIZER)
    one, two = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (full, work / "again"))
    assert one.pop("output_dir") == "full"
    assert two.pop("output_dir") == "again"
    assert one == two


def test_predict_without_a_file_asks_the_seeds_two_prompts(full: Path, work: Path, cli: Command) -> None:
    result = cli("predict", "--model_name_or_path", "full", "--max_new_tokens", "6")
    rows = [json.loads(line) for line in (work / "prediction.json").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    model, tokenizer = oracle(full)
    for row, answer in zip(rows, ("linebacker", "five"), strict=True):
        assert set(row) == {"src", "output"}
        assert row["src"].startswith(f"answer: {answer} context: The Broncos took an early lead in Super Bowl 50")
        assert row["src"].endswith("and two forced fumbles.")
        assert row["src"] in result.stdout
        ids = [tokenizer.bos_token_id, *tokenizer.encode(row["src"], add_special_tokens=False), tokenizer.eos_token_id]
        made = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        assert row["output"] == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_an_adapter_predicts_as_the_merged_model_does_in_transformers(merged: Path, work: Path, cli: Command) -> None:
    asked = [{"src": row["src"]} for row in ROWS[3:9]]
    write_rows(work / "asked.jsonl", asked)
    cli(
        *("predict", "--model_name_or_path", TINY, "--lora_path", "lora", "--data_file", "asked.jsonl"),
        *("--predict_file", "out/answers.json", "--max_new_tokens", "5", "--batch_size", "4"),
    )
    rows = [json.loads(line) for line in (work / "out" / "answers.json").read_text(encoding="utf-8").splitlines()]
    assert [row["src"] for row in rows] == [row["src"] for row in asked], "in the order of the file"
    model, tokenizer = oracle(merged)
    for row in rows:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(row["src"], add_special_tokens=False)]
        made = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
        assert row["output"] == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_evaluate_scores_adapter_and_merged_model_alike(merged: Path, work: Path, cli: Command) -> None:
    common = ("--dataset_path", "data", "--src_length", "64")
    cli("evaluate", "--model_name_or_path", TINY, "--lora_path", "lora", *common, "--output_dir", "scores")
    scores = json.loads((work / "scores" / "eval_results.json").read_text())
    loss, accuracy = oracle_scores(merged, ROWS[:5])
    assert scores["loss"] == pytest.approx(loss, abs=1e-4)
    assert scores["accuracy"] == pytest.approx(accuracy)
    trained = json.loads((work / "lora" / "all_results.json").read_text())
    assert scores["loss"] == pytest.approx(trained["eval_loss"], abs=1e-4)


def test_the_adapter_folder_is_pefts(lora: Path, merged: Path, work: Path) -> None:
    peft = pytest.importorskip("peft")
    base, _ = oracle(work / "home" / "tiny-random-llama")
    wrapped = peft.PeftModel.from_pretrained(base, str(lora)).eval()
    model, _ = oracle(merged)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert float((wrapped(ids).logits - model(ids).logits).abs().max()) <= 1e-5
    assert not (lora / "model.safetensors").exists(), "an adapter run does not write the base again"


def test_chat_answers_one_prompt(merged: Path, cli: Command) -> None:
    result = cli("chat", "--model_name_or_path", "merged", "--prompt", "Who is there?", "--max_new_tokens", "7")
    model, tokenizer = oracle(merged)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who is there?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    made = model.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :]
    assert result.stdout.strip() == tokenizer.decode(made, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--learning_rate", "nan"), ("learning_rate", "nan")),
        (("--dataset_path", "nowhere"), ("--dataset_path nowhere", "no such file or folder")),
        (("--dataset_path", "wrong.jsonl"), ("wrong.jsonl:2", "not JSON")),
        (("--dataset_path", "empty.jsonl"), ("empty.jsonl", "no row")),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], parts: tuple[str, ...], work: Path, refused: Callable[..., str]
) -> None:
    (work / "wrong.jsonl").write_text('{"src": "a", "tgt": "b"}\n{"src": "a", "tgt": \n')
    (work / "empty.jsonl").write_text("\n")
    message = refused("finetune", *TRAINING, "--output_dir", "bad", *arguments)
    for part in parts:
        assert part in message


def test_an_adapter_is_no_base_model(lora: Path, refused: Callable[..., str]) -> None:
    message = refused("predict", "--model_name_or_path", "lora")
    assert "is an adapter" in message
    assert "--lora_path" in message


def test_merge_needs_an_empty_place(merged: Path, refused: Callable[..., str]) -> None:
    message = refused("merge", "--model_name_or_path", TINY, "--lora_path", "lora", "--output_path", "merged")
    assert "--output_path merged is not empty" in message


def test_finetune_without_data_says_what_to_give(arriero: Command) -> None:
    result = arriero("finetune", "--model_name_or_path", TINY, "--output_dir", "x")
    message = one_line(result.returncode, result.stderr)
    assert "--dataset_path" in message


def test_quickstart_from_end_to_end_and_a_second_time(work: Path, cli: Command) -> None:
    arguments = (
        *("quickstart", "--model_name_or_path", "tiny-random-llama", "--output_dir", "quick"),
        *("--max_train_samples", "4", "--max_eval_samples", "3", "--disable_tqdm", "True"),
    )
    first = cli(*arguments).stdout
    for number in range(1, 6):
        assert f"[{number}/5]" in first
    assert "exact match" in first
    assert "before: " in first
    assert "arriero chat --model_name_or_path quick/model" in first
    before, after = (json.loads((work / "quick" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["questions"] == after["questions"] == len(before["answers"]) == 3
    assert [a["question"] for a in before["answers"]] == [a["question"] for a in after["answers"]]
    stamps = {path: path.stat().st_mtime_ns for path in (work / "quick").rglob("*") if path.is_file()}
    oracle(work / "quick" / "model")
    hint = next(line for line in first.splitlines() if line.startswith("  all weights"))
    options = [word.replace("runs/full", "shown") for word in hint.partition(" finetune ")[2].split()]
    shown = cli("finetune", *options, "--preview", "1")
    assert "warning" not in shown.stderr, "a command that is suggested has nothing in it that does nothing"
    second = cli(*arguments).stdout
    assert second.count("done already") == 4
    assert {path: path.stat().st_mtime_ns for path in (work / "quick").rglob("*") if path.is_file()} == stamps


def test_quickstart_leaves_a_folder_of_the_users_alone(work: Path, refused: Callable[..., str]) -> None:
    write_rows(work / "mine" / "train.jsonl", ROWS)
    message = refused("quickstart", "--model_name_or_path", "tiny-random-llama", "--output_dir", "mine")
    assert "--output_dir mine holds other files (train.jsonl): name a new or empty folder" in message
    assert [path.name for path in (work / "mine").iterdir()] == ["train.jsonl"]
    assert "is a file" in refused("quickstart", "--output_dir", "mine/train.jsonl")


def test_scores_at_the_end_are_printed(work: Path, cli: Command) -> None:
    short = ("--model_name_or_path", TINY, "--dataset_path", "data", "--max_steps", "1", "--lora", "--do_eval")
    result = cli("finetune", *short, "--evaluation_strategy", "no", "--output_dir", "scored", "--report_to", "none")
    stored = json.loads((work / "scored" / "all_results.json").read_text())
    assert f"final weights | eval_loss {stored['eval_loss']:.4f} | eval_ppl" in result.stdout
    assert "\n1 step of 8 x 1 rows" in result.stdout
    assert "trained 1 step in " in result.stdout
    assert "1 threads" not in result.stdout
    only = cli("finetune", *TRAINING, "--do_train", "no", "--load_best_model_at_end", "no", "--output_dir", "only")
    assert only.stdout.count("final weights | eval_loss") == 1
    often = cli("finetune", *short, "--output_dir", "often", "--report_to", "none")
    assert "final weights" not in often.stdout, "the last evaluation was of these weights"


def test_weights_that_are_no_numbers_are_named_without_training_too(
    full: Path, work: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(full, work / "broken", ignore=shutil.ignore_patterns("checkpoint-*", "*.jsonl", "*.yaml"))
    tensors = load_file(work / "broken" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, work / "broken" / "model.safetensors", {"format": "pt"})
    data = ("--model_name_or_path", "broken", "--dataset_path", "data")
    for verb in (("finetune", "--do_eval", "--do_train", "no", "--output_dir", "unscored"), ("evaluate",)):
        message = refused(*verb, *data)
        assert "broken: parameter model.norm.weight has values that are infinite or no numbers" in message
    assert not (work / "unscored" / "eval_results.json").exists()


def test_a_run_that_is_complete_is_not_said_to_train(full: Path, work: Path, cli: Command) -> None:
    shutil.copytree(full, work / "complete")
    before = (work / "complete" / "model.safetensors").read_bytes()
    result = cli("finetune", *TRAINING, "--output_dir", "complete", "--resume_from_checkpoint", "auto")
    assert "complete/checkpoint-6 is complete already: 6 of 6 steps" in result.stdout
    for wrong in ("trained 6", "kernels:", "MFU", "no checkpoint in"):
        assert wrong not in result.stdout
    assert (work / "complete" / "model.safetensors").read_bytes() == before


def test_only_generated_answers_are_written(work: Path, cli: Command) -> None:
    common = ("evaluate", "--model_name_or_path", TINY, "--dataset_path", "data/dev.jsonl", "--output_dir", "answers")
    result = cli(*common)
    assert "\ndata/dev.jsonl: 5 rows, " in "\n" + result.stdout, "the file, not the part of a folder that it stands for"
    assert sorted(path.name for path in (work / "answers").iterdir()) == ["eval_results.json"]
    cli(*common, "--eval_with_do_generation", "--max_new_tokens", "3")
    written = (work / "answers" / "predictions.jsonl").read_bytes()
    assert written.count(b"\n") == 5
    cli(*common)
    assert (work / "answers" / "predictions.jsonl").read_bytes() == written
