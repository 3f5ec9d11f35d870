"""Killed with SIGKILL at random moments, also inside a save, a run resumed to its end equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]

KILLS = 20
TINY = "__internal_testing__/tiny-random-llama"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
SAVING = (
    *("--save_steps", "1", "--save_total_limit", "2", "--logging_steps", "1", "--report_to", "none"),
    *("--resume_from_checkpoint", "auto"),
)

Command = Callable[[Path], list[str]]


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def finetune(work: Path) -> Command:
    """LoRA with dropout: the random state counts in every step."""
    rows = [{"src": f"Count from {i}.", "tgt": f"{i} {i + 1} {i + 2}"} for i in range(37)]
    (work / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = (
        *("--model_name_or_path", TINY, "--dataset_path", str(work), "--lora", "--lora_dropout", "0.1"),
        *("--learning_rate", "1e-2", "--max_steps", "60", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--src_length", "64", "--tgt_length", "32"),
    )
    return lambda output: [sys.executable, "-m", "arriero", "finetune", *options, *SAVING, "--output_dir", str(output)]


def pretrain(work: Path, *more: str) -> Command:
    """A model of 12 million parameters on short samples: writing weights and moments takes longer than a step."""
    shape = {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (work / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads, **ids}))
    rows = [{"text": f"Verse {i} says that {i * i} swans swim {'far and ' * (i % 9)}away."} for i in range(300)]
    (work / "verses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(
        [
            *(sys.executable, "-m", "arriero", "preprocess", "--model_name_or_path", TINY, "--append_eos"),
            *("--input_path", str(work / "verses.jsonl"), "--output_prefix", str(work / "corpus" / "verses")),
        ]
    )
    options = (
        *("--config_name", str(work / "config.json"), "--tokenizer_name_or_path", TINY),
        *("--input_dir", str(work / "corpus"), "--max_seq_length", "16"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "100"),
        *("--learning_rate", "1e-3", "--warmup_ratio", "0.1", "--split", "8,1,1", "--do_eval", "--eval_steps", "10"),
        *("--eval_iters", "2", "--test_iters", "2", "--per_device_eval_batch_size", "2", *SAVING, *more),
    )
    return lambda output: [sys.executable, "-m", "arriero", "pretrain", *options, "--output_dir", str(output)]


def kill_once(command: list[str], torn: Path, moments: random.Random, longest: float) -> bool:
    """Start the run and kill it: at any moment of its start, or some steps in, anywhere in a step or a save.

    Returns:
        Whether it died inside a save.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, bufsize=1
    )
    assert process.stdout is not None
    printed = []
    if moments.random() < 0.8:
        steps, wait = moments.randint(1, 3), moments.uniform(0.0, longest)
        for line in process.stdout:
            printed.append(line)
            steps -= line.startswith("step ") and "loss" in line
            if steps < 0:
                break
        else:
            pytest.fail("the run was over, make it longer: " + "".join(printed))
    else:
        wait = moments.uniform(0.0, 4.0)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait(60)
    process.stdout.close()
    return any("partial" in path.name for path in torn.glob(".*"))


def assert_same(torn: Path, whole: Path, weights: str) -> None:
    """Final weights, the last checkpoint's optimizer, random and train state, and every loss, to the bit."""
    [last] = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1:]
    parts = [Path(weights)] + [path.relative_to(whole) for path in last.rglob("*.safetensors")]
    assert len(parts) >= 4
    for part in parts:
        one, other = load_file(torn / part), load_file(whole / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name]), f"{part}: {name}"
    states = [json.loads((folder / last.name / "trainer_state.json").read_text()) for folder in (torn, whole)]
    for state in states:
        del state["seconds"]
    assert states[0] == states[1]
    assert scores(torn) == scores(whole)


def scores(folder: Path) -> list[dict[str, Any]]:
    """What the log and the results say, but for what depends on the clock."""
    records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    records.append(json.loads((folder / "all_results.json").read_text(encoding="utf-8")))
    kept = ("step", "epoch", "learning_rate", "grad_norm", "tokens", "train_steps", "train_tokens")
    return [
        {name: value for name, value in record.items() if name in kept or "loss" in name or "accuracy" in name}
        for record in records
    ]


@pytest.mark.parametrize(
    ("make", "more", "weights", "longest"),
    [
        pytest.param(finetune, (), "adapter_model.safetensors", 0.05, id="finetune"),
        pytest.param(pretrain, (), "model.safetensors", 0.6, id="pretrain"),
        pytest.param(pretrain, ("--async_save",), "model.safetensors", 0.6, id="pretrain-async"),
    ],
)
def test_a_run_killed_twenty_times_ends_as_the_uninterrupted_one(
    make: Callable[..., Command], more: tuple[str, ...], weights: str, longest: float, tmp_path: Path
) -> None:
    command = make(tmp_path, *more)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(command(whole))
    moments = random.Random(5)
    inside = sum(kill_once(command(torn), torn, moments, longest) for _ in range(KILLS))
    print(f"{inside} of {KILLS} kills were inside a save")
    assert inside >= 3, f"only {inside} of {KILLS} kills were inside a save"
    assert not (torn / "all_results.json").exists()
    run(command(torn))
    assert_same(torn, whole, weights)
    shown = {path.name for path in torn.iterdir()}
    assert shown == {path.name for path in whole.iterdir()}, "nothing half-written stays"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
