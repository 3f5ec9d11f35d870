"""OpenMP's threads are let go, and come again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
SCRIPT = """
import os, time, torch
from arriero.process_threads import release_workers

def threads(wanted):
    for _ in range(100):
        found = len(os.listdir("/proc/self/task"))
        if found == wanted:
            break
        time.sleep(0.05)
    return found

def compute():
    return float(torch.ones(10**6).mul(2).sum())

release_workers()
torch.set_num_threads(4)
alone = len(os.listdir("/proc/self/task"))
assert compute() == 2e6
assert threads(alone + 3) == alone + 3
for _ in range(2):
    release_workers()
    assert threads(alone) == alone, "not released"
    assert compute() == 2e6
    assert threads(alone + 3) == alone + 3
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of GCC's OpenMP")
def test_workers_end_and_come_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="of GCC's OpenMP")
def test_without_openmp() -> None:
    script = "from arriero.process_threads import release_workers; release_workers()"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=False
        ).returncode
        == 0
    )
