"""Freed memory stays with a training process while it trains, and goes back to the system afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from arriero.training.memory import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

def fill():  # 8 arrays of 40 MiB, all freed
    arrays = [torch.ones(10 << 20) for _ in range(8)]
    del arrays

fill()
before = resident()
with freed_memory_kept():
    fill()
    inside = resident()
print(inside - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_is_kept_inside_and_given_back_after() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    inside, after = map(int, printed.split())
    assert inside > 250
    assert after < 40
