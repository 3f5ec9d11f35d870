"""Trackers with the real libraries, offline, and what happens when one fails."""

from __future__ import annotations

import importlib
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.config.logging import LoggingOptions
from arriero.errors import ConfigError, MissingExtraError
from arriero.training.callbacks import trackers as trackers_module
from arriero.training.callbacks.trackers import Tracking, build_trackers

CONFIG = {"learning_rate": 0.003, "report_to": ["auto"], "run_name": None}
RECORDS: list[dict[str, float]] = [
    {"step": 1, "loss": 4.5, "grad_norm": 2.0},
    {"step": 2, "loss": 4.25, "grad_norm": 1.5},
    {"step": 2, "eval_loss": 4.0},
]


def drive(callback: Any, records: list[dict[str, float]] = RECORDS, done: int = 0) -> None:
    """What the trainer calls in a run that has `done` steps behind it; a tracker uses nothing else of a trainer."""
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=done))
    callback.on_train_begin(trainer)
    for record in records:
        callback.on_log(trainer, record)
    callback.on_train_end(trainer)


def only(options: LoggingOptions, folder: Path) -> Any:
    (callback,) = build_trackers(options, folder, CONFIG)
    return callback


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    drive(only(LoggingOptions(report_to=["tensorboard"]), tmp_path))
    events = event_accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert {(e.step, e.value) for e in events.Scalars("train/loss")} == {(1, 4.5), (2, 4.25)}
    assert {(e.step, e.value) for e in events.Scalars("eval/loss")} == {(2, 4.0)}
    (config,) = events.Tensors("config/text_summary")
    assert b'"learning_rate": 0.003' in config.tensor_proto.string_val[0]


def test_wandb_works_offline_and_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = LoggingOptions(report_to=["wandb"], project="mules", run_name="first")
    first = only(options, tmp_path)
    drive(first)
    assert not first.failed
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    words = (b"train/loss", b"4.25", b"eval/loss", b"learning_rate", b"0.003", b"mules", b"first")
    deadline = time.monotonic() + 30  # a process of wandb's own writes the file
    while not all(word in stored.read_bytes() for word in words) and time.monotonic() < deadline:
        time.sleep(0.2)
    raw = stored.read_bytes()
    for word in words:
        assert word in raw, word
    run_id = stored.stem.removeprefix("run-")
    resumed = only(options, tmp_path)
    drive(resumed, [{"step": 3, "loss": 4.0}], done=2)
    assert not resumed.failed
    assert {p.name for p in tmp_path.glob("wandb/offline-run-*/run-*.wandb")} == {f"run-{run_id}.wandb"}
    drive(only(options, tmp_path), [{"step": 1, "loss": 4.5}])  # a new run in the same folder
    assert len({p.name for p in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 2


def test_trackio_writes_its_database_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    # trackio reads TRACKIO_DIR when it is imported, which another test may have caused
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(importlib.import_module(module), "TRACKIO_DIR", tmp_path / "db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "db"))
    options = LoggingOptions(report_to=["trackio"], project="mules")
    run_folder = tmp_path / "train-1"
    run_folder.mkdir()
    first = only(options, run_folder)
    drive(first)
    second = only(options, run_folder)
    drive(second, [{"step": 3, "loss": 4.0}], done=2)
    assert not first.failed
    assert not second.failed
    with sqlite3.connect(tmp_path / "db" / "mules.db") as database:
        rows = database.execute("select distinct run_id, run_name from metrics").fetchall()
        metrics = [
            (step, bytes(text)) for step, text in database.execute("select step, metrics from metrics order by id")
        ]
        (config,) = database.execute("select config from configs").fetchone()
    assert len(rows) == 1, "the resumed run goes on in the same run"
    assert rows[0][1] == "train-1"
    assert [step for step, _ in metrics] == [1, 2, 2, 3]
    assert b'"train/loss":4.25' in metrics[1][1]
    assert b'"learning_rate":0.003' in bytes(config)


class Broken:
    name = "Broken"

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, []

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what == self.at:
            raise RuntimeError("no\nroute to host")

    def start(self, step: int) -> None:
        self._call("start")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize(
    ("at", "calls"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("finish", ["start", "log", "log", "log", "finish"]),
        ("never", ["start", "log", "log", "log", "finish"]),
    ],
)
def test_a_failing_tracker_warns_once_and_training_goes_on(
    at: str, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken(at)
    drive(Tracking(broken))
    assert broken.calls == calls
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (at != "never")
    if lines:
        assert lines[0].startswith("warning: Broken failed")
        assert "RuntimeError: no route to host" in lines[0]


def test_a_named_tracker_that_is_not_installed_is_refused_and_auto_takes_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, extra: str) -> Any:
        raise MissingExtraError(f"{module} [{extra}]")

    monkeypatch.setattr(trackers_module, "require", missing)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(MissingExtraError, match=r"\[track\]"):
            build_trackers(LoggingOptions(report_to=[name]), tmp_path, CONFIG)
    assert build_trackers(LoggingOptions(report_to=["none"]), tmp_path, CONFIG) == []
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    assert build_trackers(LoggingOptions(), tmp_path, CONFIG) == []


def test_several_trackers_and_where_tensorboard_goes(tmp_path: Path) -> None:
    for module in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(module)
    options = LoggingOptions(report_to=["visualdl", "wandb", "trackio"], logging_dir=str(tmp_path / "tb"), run_name="a")
    callbacks: Any = build_trackers(options, tmp_path, CONFIG)
    assert [callback.tracker.name for callback in callbacks] == ["TensorBoard", "W&B", "Trackio"]
    assert callbacks[0].tracker.folder == tmp_path / "tb" / "a"
    assert {callback.tracker.run_name for callback in callbacks[1:]} == {"a"}
    with pytest.raises(ConfigError, match="--report_to"):
        LoggingOptions(report_to=["mlflow"])
    with pytest.raises(ConfigError, match="--report_to names none and wandb"):
        LoggingOptions(report_to=["none", "wandb"])
    with pytest.raises(ConfigError, match="--project is empty"):
        LoggingOptions(project=" ")
