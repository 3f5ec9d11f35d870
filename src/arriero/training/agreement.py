"""What all processes of a run must have in common: options, and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from arriero.errors import ConfigError, PeerError
from arriero.parallel.processes import Processes


def check_same(processes: Processes, values: Mapping[str, str], line: Callable[[int, str, str, str], str]) -> None:
    """Refuse what processes do not have in common.

    Args:
        values: of this process, by name.
        line: from rank, name, that rank's value and rank 0's to what the user is told.

    Raises:
        ConfigError: in the first process that differs from rank 0.
        PeerError: in the others then.
    """
    said = processes.exchange(dict(values))
    for rank, other in enumerate(said):
        for name in said[0] | other:
            if other.get(name) != said[0].get(name):
                told = line(rank, name, other.get(name, "none"), said[0].get(name, "none"))
                raise ConfigError(told) if rank == processes.rank else PeerError(f"rank {rank} failed ({told})")


def check_same_data(processes: Processes, found: Mapping[str, str]) -> None:
    """Refuse processes that read different data, as where machines hold different files.

    Args:
        found: what each split is known by.

    Raises:
        ConfigError: in the first process that differs from rank 0.
        PeerError: in the others then.
    """
    check_same(
        processes,
        found,
        lambda rank, split, own, first: (
            f"rank {rank} has other {split} data ({own}) than rank 0 ({first}): let all of them read the same files"
        ),
    )
