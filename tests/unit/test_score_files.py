"""Files of scores on a disk that is full: one line for the user, and an earlier file stays whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.commands.evaluate import _write_tasks
from arriero.data.samples import Sample
from arriero.errors import ArrieroError, ConfigError, TrainingError
from arriero.parallel.processes import Processes
from arriero.training.generation_metrics import Answer
from arriero.training.run_results import write_results
from arriero.training.scoring import _write

ANSWER = Answer(Sample("Who?", "", "", "Zoë", references=("Zoë",)), "Zoë")


def scores(folder: Path, loss: float) -> None:
    _write(folder, {"loss": loss}, [ANSWER])


def tasks(folder: Path, loss: float) -> None:
    _write_tasks(folder, {"loss": loss, "samples": {"small": [{"doc": "é"}]}})


def run(folder: Path, loss: float) -> None:
    write_results(folder, {"loss": loss}, Processes(), trained=True)


@pytest.mark.parametrize(
    ("write", "error", "told", "names"),
    [
        (scores, ConfigError, "", ["eval_results.json", "predictions.jsonl"]),
        (tasks, ConfigError, "", ["eval_results.json", "samples_small.jsonl"]),
        (run, TrainingError, "; the final model is intact", ["all_results.json"]),
    ],
)
def test_a_full_disk_leaves_the_earlier_scores(
    write: Callable[[Path, float], None],
    error: type[ArrieroError],
    told: str,
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / names[0]).read_text(encoding="utf-8"))["loss"] == 1.0

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(error) as caught:
            write(tmp_path, 2.0)
    path = tmp_path / names[0]
    assert str(caught.value) == f"--output_dir {path}: cannot be written (No space left on device){told}"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_answers_are_a_row_each(tmp_path: Path) -> None:
    _write(tmp_path / "scores", {"loss": 1.0}, [ANSWER, ANSWER])
    lines = (tmp_path / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = {"id": "", "prompt": "Who?", "output": "Zoë", "references": ["Zoë"]}
    assert [json.loads(line) for line in lines] == [wanted, wanted]
    _write(tmp_path / "scores", {"loss": 2.0}, [])
    assert (tmp_path / "scores" / "predictions.jsonl").is_file(), "those of an earlier scoring stay"
