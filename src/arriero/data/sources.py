"""Where fine-tuning rows come from: a file, a folder, or a data set on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.data.samples import SQUAD_TASKS, Sample, find_splits, question_from_row, read_samples, sample_from_row
from arriero.errors import ConfigError, DataError, require

HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev", "test")}


def load_samples(
    dataset_path: str | None, data_name: str | None, task: str | None, splits: Sequence[str]
) -> dict[str, list[Sample]]:
    """The rows of the wanted splits ("train", "dev").

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
        raise ConfigError("no data: give --dataset_path or --data_name")
    return {split: read_samples(path, task) for split, path in find_splits(dataset_path, splits).items()}


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
