"""What the tests of whole commands share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import SOURCE, run_command


@pytest.fixture
def arriero(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As that of all tests, in a process of its own, but one that need not import torch first."""

    def call(
        *arguments: str, cwd: Path = tmp_path, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", **env}
        return run_command(*arguments, cwd=cwd, env=variables, timeout=timeout)

    return call
