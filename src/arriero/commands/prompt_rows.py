"""The prompts of a file, or the two of PaddleNLP's example; and their answers, printed and in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.commands.terminal import without_controls
from arriero.errors import ConfigError
from arriero.output_file import check_place, write_file

if TYPE_CHECKING:
    from arriero.data.samples import Sample

_CONTEXT = (
    "The Broncos took an early lead in Super Bowl 50 and never trailed. Newton was limited by Denver's defense, which sacked "
    "him seven times and forced him into three turnovers, including a fumble which they recovered for a touchdown. Denver "
    "linebacker Von Miller was named Super Bowl MVP, recording five solo tackles, 2½ sacks, and two forced fumbles."
)
_ANSWERS = ("linebacker", "five")  # the answers whose questions PaddleNLP's example asks for


def read_prompts(data_file: str | None, task: str | None = None, data_format: str = "auto") -> list[Sample]:
    """The rows of a file, as `evaluate` reads them, or of the dev split of a folder; without one the built-in prompts.

    Raises:
        ConfigError: a folder without that split, or a task that is not known.
        DataError: a file that cannot be read, or holds no row; a row that is none.
    """
    from arriero.data.samples import Sample
    from arriero.data.sources import find_splits, read_samples

    if data_file is None:
        return [Sample(f"answer: {answer} context: ", _CONTEXT, "", None, ends_prompt=True) for answer in _ANSWERS]
    path = Path(data_file).expanduser()
    if path.is_dir():
        path = find_splits(str(path), ["dev"], "--data_file")["dev"]
    return read_samples(path, task, data_format, needs_target=False)


def print_answer(sample: Sample, answer: str) -> None:
    print(without_controls(f"{sample.prompt}\n{answer}\n") + "-" * 20)


def check_predict_file(predict_file: str, data_file: str | None) -> None:
    """Before anything is generated; see `check_place`.

    Raises:
        ConfigError: also a place in a bundle, which holds no files but its own.
    """
    from arriero.formats.bundle_folder import is_bundle

    for folder in Path(predict_file).resolve().parents:
        if is_bundle(folder):
            raise ConfigError(
                f"--predict_file {predict_file}: {folder} is a bundle, which a file more would spoil; name another place"
            )
    reads = [data_file] if data_file is not None else []
    check_place(Path(predict_file), "--predict_file", reads=reads, makes_folder=True)


def write_answers(samples: Sequence[Sample], answers: Sequence[str], target: Path) -> None:
    """Write them as JSON lines, whole or not at all, and say so."""
    rows = (
        json.dumps({"src": sample.prompt, "output": answer}, ensure_ascii=False) + "\n"
        for sample, answer in zip(samples, answers, strict=True)
    )
    write_file(target, "".join(rows), "--predict_file")
    print(f"{len(answers)} answers: {target}")
