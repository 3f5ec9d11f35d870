"""The seed's own pre-training command runs in one process, with a small model and fewer steps."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

Arriero = Callable[..., subprocess.CompletedProcess[str]]

TINY = "__internal_testing__/tiny-random-llama"
STEPS, LENGTH = 6, 32
# All that is changed: the model, the folders, the device that is not here, and what is too much for a test.
REPLACED = {
    "model_name_or_path": TINY,
    "tokenizer_name_or_path": TINY,
    "input_dir": "corpus",
    "output_dir": "out",
    "device": "cpu",
    "max_seq_length": str(LENGTH),
    "max_steps": str(STEPS),
    "save_steps": "3",
    "eval_steps": "2",
    "logging_steps": "1",
}


def seed_command() -> list[str]:
    """The first command of the seed after its launcher: `run_pretrain.py` becomes the verb."""
    text = (Path(__file__).parents[1] / "fixtures" / "seed_commands.txt").read_text(encoding="utf-8")
    block = text.split("\n\n")[0].replace("$task_name", "llama_hybid")
    # the seed has a backslash straight behind a value ("20\")
    words = shlex.split(re.sub(r"\\\n\s*", " ", block.partition("\n")[2]))
    words = words[words.index("run_pretrain.py") + 1 :]
    for option, value in REPLACED.items():
        at = words.index(f"--{option}")
        assert not words[at + 1].startswith("--")
        words[at + 1] = value
    return words


def test_the_seed_command_trains(arriero: Arriero, tmp_path: Path) -> None:
    rows = [{"text": f"The {i}th king of the {i % 7} hills had {i * 3} horses and no peace."} for i in range(400)]
    (tmp_path / "kings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = arriero(
        *("preprocess", "--model_name", TINY, "--tokenizer_name", "LlamaTokenizer", "--input_path", "kings.jsonl"),
        *("--output_prefix", "corpus/kings", "--append_eos"),
    )
    assert made.returncode == 0, made.stderr
    command = seed_command()
    assert len(command) > 45
    done = arriero("pretrain", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if "--sharding" in line]
    assert len(told) == 1, done.stderr
    assert "no effect" in told[0]
    assert "Traceback" not in done.stderr

    out = tmp_path / "out"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert list((out / "runs").rglob("events.out.tfevents.*")), "visualdl is TensorBoard here"
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}, "O2 holds half-precision weights"
    masters = load_file(next((out / "checkpoint-6" / "optimizer").glob("*.safetensors")))
    assert masters["model.norm.weight.master"].dtype == torch.float32
    assert json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["scaler"]["scale"] == 1024.0

    records = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 6]
    # warm-up: 1 % of 6 steps is one step, from 0; then the seed's cosine to its floor
    rates = [0.0] + [5e-6 + 0.5 * (1 + math.cos(math.pi * (t - 1) / (STEPS - 1))) * 5e-6 for t in range(1, STEPS)]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates, rel=1e-9)
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_loss", "eval_ppl", "eval_bits_per_byte", "train_steps"} <= results.keys()

    # the first loss: transformers, on the first sample by the written rules, from the given weights (0.949 of 400 documents)
    lens = np.load(tmp_path / "corpus" / "kings_idx.npz")["lens"][:380]
    ids = torch.tensor(np.load(tmp_path / "corpus" / "kings_ids.npy")[: lens.sum()].astype(np.int64))
    order = np.arange((len(ids) - 1) // LENGTH, dtype=np.uint32)
    np.random.RandomState(42).shuffle(order)
    sample = ids[order[0] * LENGTH : order[0] * LENGTH + LENGTH + 1]
    from arriero.formats.download import resolve_model

    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = F.cross_entropy(model(sample[None, :-1]).logits[0], sample[1:])
    assert steps[0]["loss"] == pytest.approx(float(expected), rel=2e-3)
