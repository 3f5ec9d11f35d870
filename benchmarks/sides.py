"""One side of a comparison in a process of its own, in its own environment if need be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
