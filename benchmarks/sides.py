"""One side of a comparison in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_side(program: str, arguments: Sequence[str], side: str, data: Path, **environment: str) -> dict[str, Any]:
    """What a program prints in its last line, as JSON, when it is told to be one side and to read the data there."""
    command = [sys.executable, program, *arguments, "--side", side, "--data", str(data)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values
