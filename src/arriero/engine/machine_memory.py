"""The memory of this machine, or of the container that this process is in."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def container_limit() -> int | None:
    """Bytes that the container may take in all; None without a limit."""
    try:
        return int((_CGROUP / "memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or its word "max"
        return None


def free_memory() -> int:
    """Bytes that can be taken now: what the machine has available, and no more than the container's limit leaves."""
    available, limit = psutil.virtual_memory().available, container_limit()
    if limit is None:
        return available
    try:
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        used -= next(
            (int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0
        )  # given up at need
    except (OSError, ValueError):
        used = 0
    return max(0, min(available, limit - used))
