"""Five hundred steps of pre-training do not take more memory than one hundred."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]

STEPS = 500
# Steps whose memory is compared: the median of each, as single ones have a save or an evaluation under way.
EARLY, LATE = range(80, 121), range(455, 496)
ALLOWED = 4 * 2**20  # bytes: the pages of the log, of the sample index and of the allocator


def write_corpus(prefix: Path) -> None:
    """More tokens than the run reads, so that every step maps pages of the corpus it has not seen."""
    random = np.random.default_rng(1)
    lens = random.integers(20, 300, 2000).astype(np.int32)
    prefix.parent.mkdir()
    np.save(f"{prefix}_ids.npy", random.integers(3, 2000, lens.sum()).astype(np.uint16))
    np.savez(f"{prefix}_idx.npz", lens=lens, docs=np.arange(len(lens) + 1))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--reset_attention_mask", "--recompute"),
        ("--async_save", "--save_steps", "10", "--save_total_limit", "2", "--do_eval", "--eval_steps", "20"),
    ],
    ids=["plain", "documents-apart", "async-save-and-evaluation"],
)
def test_memory_does_not_grow(more: tuple[str, ...], tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus" / "a")
    options = (
        *("--input_dir", str(tmp_path / "corpus"), "--split", "8,1,1", "--max_seq_length", "128", "--seed", "3"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
        *("--max_steps", str(STEPS), "--save_steps", "1000", "--eval_iters", "5", "--test_iters", "5"),
        *("--per_device_eval_batch_size", "2", "--logging_steps", "1", "--report_to", "none"),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero", "pretrain", *options, "--output_dir", str(tmp_path / "run"), *more],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    measured: dict[int, int] = {}
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step ") and "| loss" in line:
            step = int(line[5 : line.index("/")])
            if step in EARLY or step in LATE:
                measured[step] = psutil.Process(process.pid).memory_info().rss
    assert process.wait(60) == 0, "".join(printed)
    early, late = (statistics.median(measured[step] for step in steps) for steps in (EARLY, LATE))
    print(f"{early / 2**20:.1f} MiB after 100 steps, {late / 2**20:.1f} MiB after {STEPS}")
    assert late - early <= ALLOWED
