"""How a launcher has told this process its place in a run: by `WORLD_SIZE` and `RANK`."""

from __future__ import annotations

import os

from arriero.errors import ConfigError


def launched_size() -> int:
    """How many processes the launcher started; 1 without one.

    Raises:
        ConfigError: the variables do not say which of how many this process is.
    """
    size = _number("WORLD_SIZE", "1")
    if size < 1:
        raise ConfigError(f"WORLD_SIZE is {size}: give the number of processes, or unset it")
    if size > 1:
        launched_rank(size)
    return size


def launched_rank(size: int) -> int:
    """Which of `size` processes this is.

    Raises:
        ConfigError: the variable does not say it.
    """
    if size == 1:
        return 0
    if "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {size} and RANK is not set: start by arriero launch, or unset WORLD_SIZE")
    rank = _number("RANK", "")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}: ranks go from 0 to {size - 1}")
    return rank


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default).strip()
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text[:40]!r}: give a number, or unset it") from None
