"""Pre-training through the real command line: from text to a model, stopped and resumed, on bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import Launcher, run_command

from arriero.cli import main

transformers = pytest.importorskip("transformers")

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]

TINY = "__internal_testing__/tiny-random-llama"
SOURCE = Path(__file__).parents[2] / "src"
TRAINING = (
    *("--input_dir", "corpus", "--max_seq_length", "32", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2", "--learning_rate", "3e-3", "--max_steps", "8", "--save_steps", "3"),
    *("--split", "6,2,2", "--do_eval", "--eval_steps", "4", "--eval_iters", "3", "--test_iters", "0"),
    *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", "--per_device_eval_batch_size", "2"),
)
VERSE = "What light through yonder window breaks? It is the east, and Juliet is the sun, number {}."


def environment(work: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "ARRIERO_HOME": str(work / "home"), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def cli(work: Path) -> Command:
    def call(*arguments: str, code: int = 0) -> Result:
        result = run_command(*arguments, cwd=work, env=environment(work))
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return call


@pytest.fixture
def here(work: Path, in_process: Command) -> Command:
    """The same in this process."""

    def call(*arguments: str) -> Result:
        result = in_process(*arguments, cwd=work, ARRIERO_HOME=str(work / "home"))
        assert result.returncode == 0, result.stderr
        return result

    return call


@pytest.fixture(scope="module")
def corpus(work: Path, cli: Command) -> Path:
    """A token corpus of a hundred documents, made by the real preprocess."""
    rows = [{"text": VERSE.format(i)} for i in range(100)]
    (work / "verses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cli(
        *("preprocess", "--model_name_or_path", TINY, "--input_path", "verses.jsonl"),
        *("--output_prefix", "corpus/verses", "--append_eos"),
    )
    return work / "corpus"


@pytest.fixture(scope="module")
def whole(work: Path, cli: Command, corpus: Path) -> Path:
    """An uninterrupted run."""
    cli("pretrain", *TRAINING, "--output_dir", "whole")
    return work / "whole"


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return dict(model.named_parameters())


def test_the_result_is_a_model_folder_with_its_scores(whole: Path) -> None:
    results = json.loads((whole / "all_results.json").read_text())
    assert results["train_steps"] == 8
    assert results["train_tokens"] == 8 * 2 * 2 * 32
    assert results["eval_ppl"] == pytest.approx(np.exp(results["eval_loss"]))
    assert {"eval_bits_per_byte", "test_loss", "test_bits_per_byte"} <= results.keys()
    values = losses(whole)
    assert values[8] < values[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    assert model.config.vocab_size % 128 == 0
    assert len(tokenizer(VERSE)["input_ids"]) > 5
    assert (whole / "loss.png").stat().st_size > 1000


def test_scores_are_those_that_transformers_computes(whole: Path, corpus: Path) -> None:
    """Loss and bits per byte of the test part, from the files alone: documents 80 to 99, one stream cut every 32 tokens."""
    results = json.loads((whole / "all_results.json").read_text())
    ids = np.load(corpus / "verses_ids.npy").astype(np.int64)
    lens = np.load(corpus / "verses_idx.npz")["lens"]
    part = ids[lens[:80].sum() :]
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    rows = (len(part) - 1) // 32
    stream = torch.tensor(part[: rows * 32 + 1])
    with torch.no_grad():
        logits = model(stream[:-1].view(rows, 32)).logits.double()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:], reduction="sum").item()
    assert results["test_loss"] == pytest.approx(total / (rows * 32), rel=1e-5)
    size = len(tokenizer.decode(stream[1:], skip_special_tokens=True).encode())
    assert results["test_bits_per_byte"] == pytest.approx(total / np.log(2) / size, rel=2e-3)


def test_a_resumed_run_is_the_same_run(whole: Path, work: Path, cli: Command) -> None:
    cli("pretrain", *TRAINING, "--output_dir", "torn", "--async_save", "True", "--learning_rate", "3e-3")
    for path in [*(work / "torn").glob("*.safetensors"), work / "torn" / "checkpoint-8" / "trainer_state.json"]:
        path.unlink()  # as if it had died after step 6
    again = cli("pretrain", *TRAINING, "--output_dir", "torn", "--resume_from_checkpoint", "auto")
    assert "checkpoint-8" in again.stdout, "the damaged checkpoint is named"
    assert "resumed from torn/checkpoint-6 at step 6" in again.stdout
    assert losses(work / "torn") == losses(whole)
    assert (work / "torn" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.peers) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_a_signal_saves_and_ends_in_order(
    number: signal.Signals, whole: Path, work: Path, cli: Command, corpus: Path
) -> None:
    folder = f"stopped-{number.name}"
    command = ("pretrain", *TRAINING, "--output_dir", folder, "--save_strategy", "no")
    process = Launcher("arriero", *command, cwd=work, env=environment(work))
    for line in process.stdout:
        if line.startswith("step 2/8"):
            process.send_signal(number)
            break
    printed = "".join(process.communicate(60))
    assert process.returncode == (130 if number == signal.SIGINT else 0)
    assert f"{number.name}: stopped after step" in printed
    assert not (work / folder / "model.safetensors").exists()
    [checkpoint] = (work / folder).glob("checkpoint-*")
    assert 2 <= int(checkpoint.name[11:]) < 8
    cli("pretrain", *TRAINING, "--output_dir", folder, "--save_strategy", "no", "--resume_from_checkpoint", "auto")
    assert (work / folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_configuration_of_a_run_reproduces_it(whole: Path, work: Path, cli: Command) -> None:
    assert yaml.safe_load((whole / "config.yaml").read_text())["split"] == "6,2,2"
    cli("pretrain", "--config", "whole/config.yaml", "--output_dir", "copy")
    assert (work / "copy" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_documents_can_be_kept_apart(whole: Path, work: Path, here: Command) -> None:
    here("pretrain", *TRAINING, "--output_dir", "apart", "--reset_attention_mask")
    first, second = losses(work / "apart"), losses(whole)
    assert first[1] != second[1]
    assert first[1] == pytest.approx(second[1], rel=0.01)
    here("pretrain", *TRAINING, "--output_dir", "packed", "--best_fit_packing", "--reset_attention_mask")
    assert losses(work / "packed")[8] < losses(work / "packed")[1]


def test_continued_training_starts_from_the_given_weights(whole: Path, work: Path, here: Command) -> None:
    here(
        *("pretrain", *TRAINING, "--model_name_or_path", "whole", "--continue_training", "1", "--max_steps", "1"),
        *("--output_dir", "further", "--learning_rate", "0", "--min_learning_rate", "0"),
    )
    for name, tensor in weights(work / "further").items():
        assert torch.equal(tensor, weights(whole)[name]), name


def test_skipped_steps_pass_without_training(whole: Path, work: Path, here: Command) -> None:
    here("pretrain", *TRAINING, "--output_dir", "skipping", "--skip_data_intervals", "3-4", "7")
    records = [json.loads(line) for line in (work / "skipping" / "train_log.jsonl").read_text().splitlines()]
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    assert not {3, 4, 7} & losses(work / "skipping").keys(), "what was not computed is not shown as 0"
    assert tokens[4] == tokens[2] == 2 * 128
    assert tokens[8] == 5 * 128
    assert losses(work / "skipping")[2] == losses(whole)[2]
    assert losses(work / "skipping")[5] != losses(whole)[5]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["pretrain", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("arriero: ")
    return message


def test_bad_input_is_one_line(
    work: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRIERO_HOME", str(work / "home"))
    monkeypatch.chdir(tmp_path)
    common = ("--input_dir", str(corpus), "--max_seq_length", "32", "--max_steps", "2", "--report_to", "none")
    assert "corpus" in refused(capsys, *common[2:], "--input_dir", "nowhere", "--output_dir", "a")
    assert "do not fill one sample" in refused(capsys, *common, "--max_seq_length", "99999", "--output_dir", "b")
    line = refused(capsys, *common, "--split", "1,0,0", "--do_eval", "--output_dir", "c")
    assert "valid" in line
    assert "split" in line
    line = refused(capsys, *common, "--continue_training", "1", "--max_seq_length", "2400", "--output_dir", "d")
    assert "--max_seq_length 2400" in line
    assert "skip_data_intervals" in refused(capsys, *common, "--skip_data_intervals", "5-2", "--output_dir", "e")
    assert not any((tmp_path / name / "model.safetensors").exists() for name in "abcde")


def test_two_runs_in_one_folder_are_refused(
    work: Path, corpus: Path, cli: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRIERO_HOME", str(work / "home"))
    monkeypatch.chdir(work)
    command = ("pretrain", *TRAINING, "--max_steps", "100000", "--output_dir", "busy")
    process = Launcher("arriero", *command, cwd=work, env=environment(work))
    try:
        for line in process.stdout:
            if line.startswith("step "):
                break
        options: tuple[Any, ...] = (*TRAINING, "--output_dir", "busy", "--resume_from_checkpoint", "auto")
        assert f"in use by another run (process {process.pid})" in refused(capsys, *options)
    finally:
        process.kill()
        process.communicate(30)
    cli("pretrain", *TRAINING, "--output_dir", "busy", "--overwrite_output_dir")  # a killed run leaves no lock behind
