"""What all processes of a run must have in common: options, data, and the weights they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from arriero.errors import ConfigError, PeerError
from arriero.formats.fingerprint import file_fingerprint, model_files
from arriero.formats.peft import ADAPTER_CONFIG
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


def check_same_weights(processes: Processes, model: Path | None, adapter: str | None = None) -> None:
    """Refuse processes that read other weights under one name, as where machines hold copies of different age.

    Args:
        model: the folder of its weights; None where they are made from the seed.
        adapter: the folder of one that is trained on.

    Raises:
        ConfigError: in the first process that differs from rank 0.
        PeerError: in the others then.
        FormatError: a file is missing or broken.
    """
    if processes.alone:
        return
    known: dict[str, str] = {}
    with processes.together():
        if model is not None:
            known |= {f"{name} of the model": value for name, value in model_files(model).items()}
        if adapter is not None:
            files = [Path(adapter) / ADAPTER_CONFIG, *sorted(Path(adapter).glob("*.safetensors"))]
            known |= {f"{path.name} of the adapter": file_fingerprint(path) for path in files if path.is_file()}
    check_same(
        processes,
        known,
        lambda rank, name, own, first: (
            f"rank {rank} has another {name} ({own}) than rank 0 ({first}): let all of them read the same files"
        ),
    )
