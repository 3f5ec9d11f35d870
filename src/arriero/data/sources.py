"""Where fine-tuning rows come from: a file, a folder, or a data set on the Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from arriero.data.samples import SQUAD_TASKS, Sample, find_splits, question_from_row, read_samples, sample_from_row
from arriero.errors import ConfigError, DataError, MissingExtraError, require
from arriero.formats.download import default_cache_dir

SQUAD_ON_HUB = "rajpurkar/squad"
HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev", "test")}


def check_data(dataset_path: str | None, data_name: str | None, task: str | None) -> None:
    """Find out before anything is loaded that there is no data.

    Raises:
        ConfigError: naming the ways to give some.
    """
    if dataset_path is None and data_name is None:
        has_library = importlib.util.find_spec("datasets") is not None
        if (task is not None and task not in SQUAD_TASKS) or not (own_squad() or has_library):
            raise ConfigError(_no_data(task))


def own_squad() -> Path | None:
    """The folder of SQuAD v1.1 in the cache, if someone has put it there."""
    folder = default_cache_dir() / "data" / "squad"
    return folder if folder.is_dir() else None


def load_samples(
    dataset_path: str | None, data_name: str | None, task: str | None, splits: Sequence[str]
) -> dict[str, list[Sample]]:
    """The rows of the wanted splits ("train", "dev"); where no data is named, those of SQuAD v1.1, as in the seed.

    Raises:
        ConfigError: if the place does not hold a split.
        DataError: if a row cannot be used.
    """
    if task is not None and task not in SQUAD_TASKS and data_name is None:
        raise ConfigError(
            f"--task_name {task} is not known: {' or '.join(SQUAD_TASKS)}, or leave it out for jsonl rows"
        )
    if data_name is not None:
        return {split: _from_hub(data_name, task, split) for split in splits}
    if dataset_path is None:
        return _squad(task or "squad", splits)
    return {split: read_samples(path, task) for split, path in find_splits(dataset_path, splits).items()}


def _squad(task: str, splits: Sequence[str]) -> dict[str, list[Sample]]:
    folder = own_squad()
    print(f"data: SQuAD v1.1, {folder or f'{SQUAD_ON_HUB} of the Hub'}")
    if folder is not None:
        return {split: read_samples(path, task) for split, path in find_splits(str(folder), splits).items()}
    try:
        return {split: _from_hub(SQUAD_ON_HUB, task, split) for split in splits}
    except (DataError, MissingExtraError) as error:
        raise ConfigError(f"{_no_data(task)} ({error})") from error


def _no_data(task: str | None) -> str:
    return (
        f"no data: give --dataset_path (a folder with train.json and dev.json), e.g. SQuAD v1.1 with --task_name "
        f"{task or 'squad'}; without it SQuAD is taken from {default_cache_dir() / 'data' / 'squad'}, or else from the Hub "
        f"as --data_name {SQUAD_ON_HUB}"
    )


def _from_hub(name: str, task: str | None, split: str) -> list[Sample]:
    datasets = require("datasets", "data")
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the library's own errors share no base class
        raise DataError(f"--data_name {name}: {' '.join(str(error).split())[:300]}") from error
    for candidate in HUB_SPLITS[split]:
        if candidate in found:
            break
    else:
        raise ConfigError(
            f"--data_name {name} has no {' or '.join(HUB_SPLITS[split])} split: it has {', '.join(found)}"
        )
    where = f"{name}[{candidate}]"
    rows = [(f"{where} row {i}", dict(row)) for i, row in enumerate(found[candidate])]
    if task in SQUAD_TASKS:
        return [SQUAD_TASKS[task](question_from_row(row, place)) for place, row in rows]
    return [sample_from_row(row, place) for place, row in rows]
