"""The last line of a verb that has written something: the command that tries it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def tell_next(*words: str | Path) -> None:
    """Print the command, ready for a shell; of several processes the first does that.

    Args:
        words: what stands after `arriero`.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"try it: arriero {shlex.join(map(str, words))}", flush=True)
