"""How many threads a computation may be given."""

from __future__ import annotations

import os

from arriero.errors import ConfigError

_EACH_CORE = 4


def check_threads(name: str, threads: int | None) -> None:
    """Refuse more threads than any use, of which a process would die or stand still.

    Args:
        name: of the option, as it is written.

    Raises:
        ConfigError: more than four for each core.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > _EACH_CORE * cores:
        raise ConfigError(
            f"{name} {threads}: this machine has {cores} cores, and more than {_EACH_CORE * cores} threads only wait for "
            "each other; leave it out"
        )
