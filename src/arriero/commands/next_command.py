"""The last line of a verb that has written something: the command that tries it."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path


def program() -> str:
    """How the command is called from here: in a clone whose environment is not active by its path."""
    own = Path(".venv/bin/arriero")
    return str(own) if own.exists() and shutil.which("arriero") is None else "arriero"


def tell_next(*words: str | Path) -> None:
    """Print the command, ready for a shell; of several processes the first does that.

    Args:
        words: what stands after `arriero`.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"try it: {program()} {shlex.join(map(str, words))}", flush=True)
