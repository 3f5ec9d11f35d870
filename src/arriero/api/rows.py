"""Rows in memory, as files that the readers of rows read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from arriero.data.sources import FILE_STEMS
from arriero.errors import ArrieroError, ConfigError, DataError

Row: TypeAlias = Mapping[str, Any]
# Of one split, or of several by their names ("train", "dev").
Rows: TypeAlias = Iterable[Row] | Mapping[str, Iterable[Row]]


@contextmanager
def rows_as_files(options: Mapping[str, Any], keep_beside: Any = None) -> Iterator[dict[str, Any]]:
    """The options with a path where `dataset_path` is rows; others as they are.

    Args:
        keep_beside: the run folder whose configuration names the path: the files stay, in `FOLDER.rows`, under a name that
            their bytes decide. None: they are for this call only.

    Raises:
        ConfigError: rows of a split that there is none of that name.
        DataError: a row that is no mapping, or no JSON.
    """
    given = options.get("dataset_path")
    if given is None or isinstance(given, str | os.PathLike):
        yield dict(options)
        return
    files = _files(given)
    if options.get("val_size") and files.keys() - {"train.jsonl", "rows.jsonl"}:
        raise ConfigError(
            "val_size holds rows out of the training rows, and dataset_path has dev rows: drop one of them"
        )
    if not isinstance(keep_beside, str | os.PathLike):
        with tempfile.TemporaryDirectory(prefix="arriero-rows-") as temporary:
            yield {**options, "dataset_path": _write(Path(temporary), files)}
        return
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    run = Path(os.path.expanduser(keep_beside))
    home = Path(f"{run}.rows")
    folder = home / digest
    made = not folder.exists()
    path = _write(folder, files)
    try:
        yield {**options, "dataset_path": path}
    except ArrieroError:
        config = run / "config.yaml"
        if made and not (config.is_file() and digest in config.read_text(encoding="utf-8")):  # refused before it began
            shutil.rmtree(folder, ignore_errors=True)
            if home.is_dir() and not any(home.iterdir()):
                home.rmdir()
        raise


def _files(rows: Any) -> dict[str, str]:
    """File name -> its text."""
    if not isinstance(rows, Mapping):
        return {"rows.jsonl": _lines(rows, "dataset_path")}
    stems = [stem for names in FILE_STEMS.values() for stem in names]
    for split in rows:
        if split not in stems:
            raise ConfigError(
                f"dataset_path has rows of {str(split)[:40]!r}: the splits are {', '.join(stems)}; one row goes into a list"
            )
    return {f"{split}.jsonl": _lines(part, f"dataset_path[{split!r}]") for split, part in rows.items()}


def _lines(rows: Any, name: str) -> str:
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes):
        raise DataError(f"{name} is {type(rows).__name__}: give a path, or rows, a list of dicts")
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}: row {number} is {type(row).__name__}: a row is a dict, such as of src and tgt")
        try:
            lines.append(json.dumps(dict(row), allow_nan=False) + "\n")
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{name}: row {number} is not JSON: {error}") from error
    return "".join(lines)


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    """Returns what `dataset_path` names: the folder, or a file that stands for every split."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
                file.write(text)
            Path(file.name).replace(folder / name)  # another process of the run may write the same
    except OSError as error:
        raise ConfigError(f"{folder}: the rows of dataset_path cannot be kept there ({error.strerror})") from error
    return folder / "rows.jsonl" if "rows.jsonl" in files else folder
