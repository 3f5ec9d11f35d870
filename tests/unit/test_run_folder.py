"""The folder of a run: one run at a time, what is refused, overwritten and gone on from, what a killed run left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.cli import main
from arriero.config.checkpoint import CheckpointOptions
from arriero.errors import ConfigError, FormatError, TrainingError
from arriero.formats.receipt import sha256_of
from arriero.parallel.processes import Processes
from arriero.training import run_folder
from arriero.training.run_folder import LOCK, REPLACED, RunFolder

HOLDER = """
import sys
from arriero.config.checkpoint import CheckpointOptions
from arriero.training.run_folder import RunFolder
with RunFolder(CheckpointOptions(output_dir=sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def folder(path: Path, **options: Any) -> RunFolder:
    return RunFolder(CheckpointOptions(output_dir=str(path), **options))


def checkpoint(run: Path, step: int, content: bytes = b"weights") -> Path:
    """A checkpoint by the written format: files, and a manifest with their sizes and hashes."""
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "trainer_state.json").write_text("{}")
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_one_run_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with folder(run) as first:
        assert first.path == run
        assert first.resume is None
        checkpoint(run, 3)
        for options in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
            with pytest.raises(ConfigError, match=rf"(not empty|in use by another run \(process {os.getpid()}\))"):
                folder(run, **options)
        assert names(run) == [LOCK, "checkpoint-3"], "a refused run must not overwrite anything"
    assert names(run) == ["checkpoint-3"]
    with folder(run, resume_from_checkpoint="auto") as second:
        assert second.resume == run / "checkpoint-3"


def test_another_process_holds_it_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=rf"process {process.pid}\)"):
            folder(tmp_path / "run")
    finally:
        process.kill()
        process.wait(30)
        process.stdin.close()
        process.stdout.close()
    assert names(tmp_path / "run") == [LOCK]
    with folder(tmp_path / "run"):  # neither is a lock that nobody holds a run, nor is the folder in use
        pass


def test_a_lock_that_its_owner_has_just_removed_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run ends between the second one's opening of the lock file and its locking of it."""
    run, lock = tmp_path / "run", fcntl.flock
    first = folder(run)

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with folder(run):
        assert names(run) == [LOCK]
        with pytest.raises(ConfigError, match="in use by another run"):
            folder(run)


def test_a_used_folder_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match="--overwrite_output_dir starts afresh, --resume_from_checkpoint auto goes on"
    ):
        folder(tmp_path)
    assert names(tmp_path) == ["thesis.txt"]


RECORDS = ("train_log.jsonl", "all_results.json", "loss.png", "samples.jsonl", "reference_logps.safetensors")
FULL = ("config.json", "generation_config.json", "model.safetensors")
FOREIGN = ("checkpoint-4", "checkpoint-final", "mine_results.json", "notes.md", "precious.safetensors")


def used(path: Path) -> None:
    """A run with a full model, and what is not of it."""
    checkpoint(path, 2)
    checkpoint(path, 10)
    (path / "checkpoint-final").mkdir()  # not ours: no number
    (path / "checkpoint-4").mkdir()
    (path / "checkpoint-4" / "training_args.bin").touch()  # of transformers
    (path / "merged").mkdir()  # not ours: no model
    for name in (*RECORDS, *FULL, *FOREIGN[2:], "config.yaml"):
        (path / name).write_text("{}\n")


def fail(path: Path, write: Callable[[], object]) -> None:
    """A run that overwrites, writes something and fails."""
    with contextlib.suppress(TrainingError), folder(path, overwrite_output_dir=True) as run:
        run.clear()
        write()
        raise TrainingError("step 2: loss nan")


def test_overwriting_takes_the_run_and_nothing_else(tmp_path: Path) -> None:
    used(tmp_path)
    before = names(tmp_path)
    with folder(tmp_path, overwrite_output_dir=True) as run:
        assert run.resume is None
        assert names(tmp_path) == [LOCK, *before], "what turns out wrong before the first step costs nothing"
        run.clear()
        assert names(tmp_path) == [LOCK, REPLACED, *sorted((*FOREIGN, "config.yaml", "merged"))]
        (tmp_path / "adapter_config.json").touch()
    assert names(tmp_path) == sorted((*FOREIGN, "adapter_config.json", "config.yaml", "merged"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_final_model_outlives_the_run_that_fails_to_replace_it(tmp_path: Path, killed: bool) -> None:
    used(tmp_path)
    if killed:
        folder(tmp_path, overwrite_output_dir=True).clear()
        (tmp_path / LOCK).unlink()
        assert not (tmp_path / "model.safetensors").exists()
    fail(tmp_path, lambda: None)
    assert names(tmp_path) == sorted((*FOREIGN, *FULL, "config.yaml", "merged"))


def test_a_final_model_goes_when_the_run_that_replaces_it_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()
    fail(tmp_path, lambda: checkpoint(tmp_path, 1))
    assert names(tmp_path) == [REPLACED, "checkpoint-1"]
    assert names(tmp_path / REPLACED) == ["config.json", "model.safetensors"]
    assert f"{tmp_path / REPLACED}: the earlier final model" in capsys.readouterr().out
    with folder(tmp_path, resume_from_checkpoint="auto") as again:  # only scored
        assert again.resume == tmp_path / "checkpoint-1"
    assert REPLACED in names(tmp_path)
    with folder(tmp_path, resume_from_checkpoint="auto") as again:
        again.clear()
        (tmp_path / "adapter_config.json").touch()
    assert names(tmp_path) == ["adapter_config.json", "checkpoint-1"]


def test_a_final_model_is_not_mixed_with_one_half_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    fail(tmp_path, (tmp_path / "adapter_config.json").touch)
    assert names(tmp_path) == [REPLACED, "adapter_config.json"]


def test_overwriting_spares_what_the_run_is_made_from(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path / "run", 2)
    with (
        folder(tmp_path / "run", overwrite_output_dir=True) as run,
        pytest.raises(ConfigError, match=r"would delete .*checkpoint-2, which this run needs"),
    ):
        run.check_inputs(None, "facebook/llama-7b", str(kept))


def test_going_back_drops_the_checkpoints_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    with folder(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) as run:
        run.drop_later(2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert capsys.readouterr().out.count(": deleted") == 2


def test_nothing_whole_left_is_not_a_fresh_start(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(FormatError, match="no whole checkpoint is left: --overwrite_output_dir starts afresh"):
        folder(tmp_path, resume_from_checkpoint="auto")


@pytest.mark.parametrize("options", [{"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}])
def test_what_a_killed_run_left_half_written_goes(tmp_path: Path, options: dict[str, Any]) -> None:
    """All three places where a save writes before it renames; the neighbours' files are not touched."""
    run = tmp_path / "run"
    checkpoint(run, 2)
    strangers = [".run.tmp", ".runner.abcd_123.tmp", ".other.abcd_123.tmp", "run.abcd_123.tmp", ".run.abcd_12.tmp"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (run / ".checkpoint-4.partial" / "optimizer").mkdir(parents=True)
    (run / "..checkpoint-4.partial.x_12abcd.tmp").mkdir()
    (run / "..checkpoint-4.partial.x_12abcd.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".run.q1w2e3r4.tmp").mkdir()
    with folder(run, **options):
        assert names(run) == [LOCK, "checkpoint-2"]
        assert names(tmp_path) == sorted(["run", *strangers])


def test_auto_takes_the_newest_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By number, not by name; each damaged one is named."""
    run = tmp_path / "run"
    with folder(run, resume_from_checkpoint="auto") as fresh:
        assert fresh.resume is None
    assert capsys.readouterr().out == f"no checkpoint in {run}: the run starts anew\n"
    for step in (9, 10, 100, 11):
        checkpoint(run, step)
    (run / "checkpoint-100" / "model.safetensors").write_bytes(b"Weights")  # as long as before
    (run / "checkpoint-11" / "manifest.json").unlink()
    with folder(run, resume_from_checkpoint="auto") as again:
        assert again.resume == run / "checkpoint-10"
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [True, True]
    assert "checkpoint-100/model.safetensors" in lines[0]
    assert "checkpoint-11" in lines[1]


def test_an_explicit_checkpoint_may_be_of_another_run(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", 5)
    with folder(tmp_path / "run", resume_from_checkpoint=str(other)) as run:
        assert run.resume == other
    with pytest.raises(ConfigError, match="no such folder"):
        folder(tmp_path / "third", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not (tmp_path / "third").exists()


def test_places_that_cannot_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        folder(tmp_path / "file" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        folder(tmp_path / "run")


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "new" / "deeper" / "run"
    with folder(run):
        assert names(run) == [LOCK]
    assert names(tmp_path) == []
    there = tmp_path / "there"
    there.mkdir()
    with folder(there / "run"):
        pass
    assert names(there) == []
    with folder(there):  # a folder that someone made stays, empty or not
        pass
    assert names(tmp_path) == ["there"]
    with folder(tmp_path / "kept") as kept:
        (kept.path / "train_log.jsonl").touch()
    assert names(tmp_path / "kept") == ["train_log.jsonl"]


def test_a_run_without_a_whole_checkpoint_gives_its_folder_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint(run, 3)
    (run / "checkpoint-3" / "manifest.json").write_text("{}")
    for _ in range(2):  # not locked by the first
        with pytest.raises(FormatError, match="no whole checkpoint"):
            folder(run, resume_from_checkpoint="auto")
    assert names(run) == ["checkpoint-3"]


def test_refused_commands_leave_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"wrong": 1}\n')
    (tmp_path / "model").mkdir()
    flags = (
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "out" / "run"),
    )
    assert main(["finetune", "--dataset_path", str(rows), *flags]) == 2
    assert capsys.readouterr().err
    assert names(tmp_path) == ["model", "rows.jsonl"]


def test_a_folder_that_another_machine_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Processes):
        """Rank 1 of two, to which rank 0 has said what is in its lock."""

        alone = False  # type: ignore[assignment]
        together = staticmethod(contextlib.nullcontext)  # type: ignore[assignment]

        def by_first(self, work: Any) -> Any:
            return lock

    monkeypatch.setattr(run_folder, "SEEN_SECONDS", 0.3)
    options = CheckpointOptions(output_dir=str(tmp_path / "run"), resume_from_checkpoint="none-is-read")
    with RunFolder(CheckpointOptions(output_dir=str(tmp_path / "run"))):
        lock = (tmp_path / "run" / LOCK).read_text()
        with RunFolder(options, Second(rank=1)) as shared:
            assert shared.path == tmp_path / "run"
        for there in ("", f"{os.getpid()}\n0123456789abcdef\n"):
            (tmp_path / "run" / LOCK).write_text(there)
            with pytest.raises(ConfigError, match=r"on the machine of rank 1 is not the folder that rank 0 has there"):
                RunFolder(options, Second(rank=1))
