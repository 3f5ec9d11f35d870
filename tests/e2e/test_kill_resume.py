"""Killed with SIGKILL at random moments, also inside a save, a run resumed to its end equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]

KILLS = 20


def command(data: Path, output: Path) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "arriero",
            "finetune",
            "--model_name_or_path",
            "__internal_testing__/tiny-random-llama",
        ),
        *(
            "--dataset_path",
            str(data),
            "--lora",
            "--lora_dropout",
            "0.1",
            "--learning_rate",
            "1e-2",
            "--max_steps",
            "60",
        ),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--src_length", "64"),
        *("--tgt_length", "32", "--save_steps", "1", "--save_total_limit", "2", "--logging_steps", "1"),
        *("--resume_from_checkpoint", "auto", "--report_to", "none", "--output_dir", str(output)),
    ]


def test_a_run_killed_twenty_times_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"src": f"Count from {i}.", "tgt": f"{i} {i + 1} {i + 2}"} for i in range(37)]
    (data / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = tmp_path / "whole"
    subprocess.run(command(data, whole), check=True, capture_output=True, timeout=300)
    moments = random.Random(5)
    torn = tmp_path / "torn"
    log = torn / "train_log.jsonl"
    killed = 0
    while killed < KILLS:
        process = subprocess.Popen(command(data, torn), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        steps = moments.randint(1, 3)
        for line in process.stdout:  # a few steps in, then anywhere within a step or a save
            steps -= line.startswith("step ")
            if steps < 0:
                break
        else:
            assert process.wait(60) == 0, f"ended after {killed} kills"
            pytest.fail(f"the run was over after {killed} kills: make it longer")
        try:
            process.wait(moments.uniform(0.0, 0.05))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait(60)
        process.stdout.close()
        killed += 1
    subprocess.run(command(data, torn), check=True, capture_output=True, timeout=300, env=os.environ)
    for name in (
        "adapter_model.safetensors",
        "checkpoint-60/optimizer/model-00001-of-00001.safetensors",
        "checkpoint-60/random.safetensors",
    ):
        assert (torn / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [
        [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (log, whole / "train_log.jsonl")
    ]
    assert losses[0] == losses[1]
    assert not list(torn.glob(".checkpoint-*.partial"))
