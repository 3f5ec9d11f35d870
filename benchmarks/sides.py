"""One side of a comparison in a process of its own, in its own environment if need be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Clock:
    """Seconds and loss of each optimizer step: the hooks of a Trainer's callback, transformers' and PaddleNLP's alike."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def make_environment(folder: Path, packages: Sequence[str]) -> None:
    """A virtual environment with some packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)


def run_side(
    program: str,
    arguments: Sequence[str],
    side: str,
    data: Path,
    *,
    python: Path | str = sys.executable,
    **environment: str,
) -> dict[str, Any]:
    """What a program prints in its last line, as JSON, when it is told to be one side and to read the data there."""
    command = [str(python), program, *arguments, "--side", side, "--data", str(data)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values
