"""Where fine-tuning rows come from: files, folders, a mixture of them, or a data set on the Hub."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from arriero.config.data import DataOptions, dataset_parts
from arriero.data.row_files import MAX_ROW_BYTES, SUFFIXES, is_array, read_rows
from arriero.data.rows.formats import sample_from_row
from arriero.data.rows.questions import SQUAD_TASKS, question_from_row, samples_of
from arriero.data.rows.values import keys_of
from arriero.data.samples import Sample
from arriero.data.squad import Question, read_squad
from arriero.errors import ConfigError, DataError, MissingExtraError, require

Row = TypeVar("Row")
SQUAD_ON_HUB = "rajpurkar/squad"
HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev", "test")}
FILE_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid", "test")}


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
    folder = _cache_dir() / "data" / "squad"
    return folder if folder.is_dir() else None


def _cache_dir() -> Path:
    # it imports torch, which who reads a file of prompts may not have
    from arriero.formats.download import default_cache_dir

    return default_cache_dir()


def check_task(task: str | None) -> None:
    """
    Raises:
        ConfigError: a task that there is none of that name.
    """
    if task is not None and task not in SQUAD_TASKS:
        raise ConfigError(
            f"--task_name {task} is not known: {' or '.join(SQUAD_TASKS)}, or leave it out for jsonl rows"
        )


def load_samples(
    dataset_path: str | None,
    data_name: str | None,
    task: str | None,
    splits: Sequence[str],
    *,
    data_format: str = "auto",
    limits: dict[str, int | None] | None = None,
    val_size: float | None = None,
) -> dict[str, list[Sample]]:
    """The rows of the wanted splits ("train", "dev"); where no data is named, those of SQuAD v1.1, as in the seed.

    Args:
        dataset_path: a file or folder, or several with commas between them: a mixture, whose rows follow each other here.
        data_format: how rows are read (`arriero.data.rows.formats`).
        limits, val_size: see `rows_of_splits`.

    Raises:
        ConfigError: if the place does not hold a split.
        DataError: if a row cannot be used.
    """
    if data_name is None:
        check_task(task)
    read = read_splits(splits, val_size)
    names = [data_name or "SQuAD"]
    if data_name is not None:
        parts = {split: [_from_hub(data_name, task, split, data_format)] for split in read}
    elif dataset_path is None:
        parts = {split: [samples] for split, samples in _squad(task or "squad", read).items()}
    else:
        files = files_of(dataset_path, read)
        parts = {split: [read_samples(path, task, data_format) for path in paths] for split, paths in files.items()}
        names = list(map(str, files.get("train", [])))
    return {
        split: [replace(row, source=number) if number else row for number, rows in enumerate(files) for row in rows]
        for split, files in rows_of_splits(parts, names, splits, limits or {}, val_size).items()
    }


def samples_for(data: DataOptions, splits: Sequence[str]) -> dict[str, list[Sample]]:
    """`load_samples` of what options name."""
    return load_samples(
        data.dataset_path,
        data.data_name,
        data.task_name,
        splits,
        data_format=data.data_format,
        limits={"train": data.max_train_samples, "dev": data.max_eval_samples},
        val_size=data.val_size,
    )


def read_splits(splits: Sequence[str], val_size: float | None) -> Sequence[str]:
    """What has to be read for these: rows that are held out are training rows."""
    return splits if val_size is None else ["train"]


def rows_of_splits(
    parts: Mapping[str, list[list[Row]]],
    names: Sequence[str],
    splits: Sequence[str],
    limits: Mapping[str, int | None],
    val_size: float | None = None,
) -> dict[str, list[list[Row]]]:
    """The rows of each file of the wanted splits.

    Args:
        parts: those that the files of `read_splits` hold.
        names: of the training files.
        limits: of each split, how many rows of each file are used.
        val_size: the share, or from 1 on the number, of the rows of each training file that are the dev rows, evenly spread
            over it; None: the dev rows are read.

    Raises:
        DataError: there would be no row of a split.
    """
    if val_size is not None:
        divided = [_held_out(rows, val_size, name) for rows, name in zip(parts["train"], names, strict=True)]
        parts = {"train": [kept for kept, _ in divided], "dev": [held for _, held in divided]}
    return {split: [rows[: limits.get(split)] for rows in parts[split]] for split in splits}


def _held_out(rows: Sequence[Row], size: float, name: str) -> tuple[list[Row], list[Row]]:
    """The others and the held out ones: the same for the same number of rows."""
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise DataError(
            f"{name}: --val_size {size:g} would hold out {count} of {len(rows)} rows: leave at least one on either side"
        )
    held = {(2 * number + 1) * len(rows) // (2 * count) for number in range(count)}
    return [row for at, row in enumerate(rows) if at not in held], [rows[at] for at in sorted(held)]


def files_of(dataset_path: str, splits: Sequence[str]) -> dict[str, list[Path]]:
    """The files of the wanted splits: of "train" one for each part of a mixture; a dev file that several parts share once.

    Raises:
        ConfigError: if a place does not hold a split.
    """
    found: dict[str, list[Path]] = {split: [] for split in splits}
    for part in dataset_parts(dataset_path):
        for split, path in find_splits(part.path, splits).items():
            if split == "train" or path.resolve() not in map(Path.resolve, found[split]):
                found[split].append(path)
    return found


def name_of_rows(dataset_path: str | None, data_name: str | None, split: str, val_size: float | None = None) -> str:
    """What a line about the rows of a split calls them: their file, or files; of a data set of the Hub, the split's name."""
    if data_name is not None or dataset_path is None:
        return split
    if val_size is not None:
        return names_of_splits(dataset_path, data_name, [split], val_size)[split]
    return ", ".join(map(str, files_of(dataset_path, [split])[split]))


def names_of_splits(
    dataset_path: str | None, data_name: str | None, splits: Sequence[str], val_size: float | None = None
) -> dict[str, str]:
    """What the lines of a run call the rows of each split: the split and its files, where files are named.

    Prints a warning if the dev rows are, or have among them, the training rows.
    """
    if data_name is not None or dataset_path is None:
        return {split: split for split in splits}
    files = files_of(dataset_path, read_splits(splits, val_size))
    if val_size is not None:
        named = ", ".join(map(str, files["train"]))
        return {split: f"train ({named})" if split == "train" else f"{split} (held out of {named})" for split in splits}
    trained = {path.resolve() for path in files.get("train", [])}
    if same := [str(path) for path in files.get("dev", []) if path.resolve() in trained]:
        print(
            f"warning: dev: the training rows themselves ({', '.join(same)}), whose scores tell nothing of other rows: name a "
            "folder with train and dev files, put a dev.jsonl beside the file, or hold some out with --val_size 0.1",
            flush=True,
        )
    return {split: f"{split} ({', '.join(map(str, paths))})" for split, paths in files.items()}


def read_samples(path: Path, task: str | None, data_format: str = "auto", *, needs_target: bool = True) -> list[Sample]:
    """Every row of one file.

    A `.json` file that holds one object is SQuAD, unless a format is named; otherwise the suffix says whether it is a
    table, and everything else is JSON lines or one JSON array.

    Args:
        task: `squad` or `squad_qa` for SQuAD files and rows; None decides by the rows' keys.
        needs_target: a row without an answer is refused.

    Raises:
        ConfigError: for another task.
        DataError: if the file is missing, malformed or without a row.
    """
    check_task(task)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if data_format == "auto" and _is_squad(path):
        samples = samples_of(read_squad(path), task or "squad")
    else:
        samples = _samples(read_rows(path), task, data_format, needs_target)
    if not samples:
        raise DataError(f"{path}: holds no row{' to learn from' if needs_target else ''}")
    return samples


def _samples(
    rows: Iterable[tuple[str, Any]], task: str | None, data_format: str, needs_target: bool = True
) -> list[Sample]:
    if task == "squad_qa":
        return samples_of((_question(row, where, task, needs_target) for where, row in rows), task)
    return [sample_from_row(row, where, data_format=data_format, needs_target=needs_target) for where, row in rows]


def _question(row: Any, where: str, task: str, needs_target: bool) -> Question:
    """
    Raises:
        DataError: as `question_from_row`; of a row of another kind it names the task, which may stand in a file of options.
    """
    if isinstance(row, dict) and row.get("context") is None:
        raise DataError(
            f"{where}: has no 'context', which --task_name {task} asks for (here, or in the --config file); it has "
            f"{keys_of(row)}: --task_name none reads rows by their own keys"
        )
    return question_from_row(row, where, needs_target=needs_target)


def _is_squad(path: Path) -> bool:
    """SQuAD is one JSON object with a list `data`; a JSON-lines file's first line is a whole object of its own."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        first = next((line for line in iter(lambda: file.readline(MAX_ROW_BYTES), b"") if line.strip()), b"")
    if not first or is_array(first):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True  # an object over several lines; read_squad says what is wrong if it is not SQuAD
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def find_splits(dataset_path: str, wanted: Sequence[str], flag: str = "--dataset_path") -> dict[str, Path]:
    """The files of the wanted splits ("train", "dev").

    A folder holds `train.json` and `dev.json` (or `.jsonl`, `.csv`, `.tsv`, `.parquet`); a file is the split that is asked
    for; where both are, it is the training split, and the dev split is the `dev.json` (or so) beside it, or the same file if
    there is none.

    Raises:
        ConfigError: if a wanted split has no file.
    """
    path = Path(dataset_path)
    if path.is_file():
        beside = [path.parent / name for name in _split_names("dev")] if "train" in wanted else []
        dev = next((sibling for sibling in beside if sibling.is_file()), path)
        return {split: dev if split == "dev" else path for split in wanted}
    if not path.is_dir():
        raise ConfigError(
            f"{flag} {dataset_path}: no such file or folder"
            + (" (a Hub data set is named by --data_name)" if flag == "--dataset_path" else "")
        )
    found: dict[str, Path] = {}
    for split in wanted:
        for name in _split_names(split):
            if (path / name).is_file():
                found[split] = path / name
                break
        else:
            raise ConfigError(f"{flag} {dataset_path}: the folder has no {' or '.join(_split_names(split)[:2])}")
    return found


def _split_names(split: str) -> list[str]:
    return [f"{stem}{suffix}" for stem in FILE_STEMS[split] for suffix in SUFFIXES]


def rows_by_source(samples: Sequence[Sample]) -> list[int]:
    """How many rows of each part of a mixture there are."""
    counts = Counter(sample.source for sample in samples)
    return [counts[source] for source in range(max(counts, default=0) + 1)]


def _squad(task: str, splits: Sequence[str]) -> dict[str, list[Sample]]:
    folder = own_squad()
    place = folder or f"{SQUAD_ON_HUB} of the Hub"
    print(f"no data is given: SQuAD v1.1 is taken ({place}); --dataset_path FOLDER names your own", flush=True)
    if folder is not None:
        return {split: read_samples(path, task) for split, path in find_splits(str(folder), splits).items()}
    try:
        return {split: _from_hub(SQUAD_ON_HUB, task, split, "auto") for split in splits}
    except (DataError, MissingExtraError) as error:
        raise ConfigError(f"{_no_data(task)} ({error})") from error


def _no_data(task: str | None) -> str:
    return (
        f"no data: give --dataset_path (a folder with train.json and dev.json), e.g. SQuAD v1.1 with --task_name "
        f"{task or 'squad'}; without it SQuAD is taken from {_cache_dir() / 'data' / 'squad'}, or else from the Hub "
        f"as --data_name {SQUAD_ON_HUB}"
    )


def _from_hub(name: str, task: str | None, split: str, data_format: str) -> list[Sample]:
    datasets = require("datasets", "data")
    reached = _hub_answers(name)
    before = datasets.config.HF_HUB_OFFLINE
    try:
        if not reached:  # its own attempts take half a minute
            datasets.config.HF_HUB_OFFLINE = True
        found = datasets.load_dataset(name)
    except Exception as error:  # the library's own errors share no base class
        if not reached:
            raise DataError(
                f"--data_name {name}: the Hub cannot be reached, and the local cache has no such data set"
            ) from error
        raise DataError(f"--data_name {name}: {' '.join(str(error).split())[:300]}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    for candidate in HUB_SPLITS[split]:
        if candidate in found:
            break
    else:
        raise ConfigError(
            f"--data_name {name} has no {' or '.join(HUB_SPLITS[split])} split: it has {', '.join(found)}"
        )
    where = f"{name}[{candidate}]"
    rows = ((f"{where} row {i}", dict(row)) for i, row in enumerate(found[candidate]))
    if task in SQUAD_TASKS:
        return samples_of((question_from_row(row, place) for place, row in rows), task)
    return _samples(rows, task, data_format)


def _hub_answers(name: str) -> bool:
    """Whether the Hub can be reached at all, by one question."""
    from huggingface_hub import HfApi

    from arriero.formats.hub_errors import is_unreachable

    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # also what the name is not: datasets knows better
        return not is_unreachable(error)
    return True
