"""The cache of indexes: used only when whole and of the same description, built once, whatever is killed when."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from arriero.data.corpus import index_cache
from arriero.data.corpus.index_cache import IndexCache
from arriero.errors import DataError

SOURCE = Path(__file__).parents[2] / "src"
DESCRIPTION = {"kind": "test", "seed": 42}


def arrays():
    return {"pairs": np.arange(12, dtype=np.int32).reshape(6, 2), "order": np.arange(5, dtype=np.uint32)}


def never():
    raise AssertionError("built again")


def entry_of(folder: Path) -> Path:
    (entry,) = [path for path in folder.iterdir() if path.is_dir()]
    return entry


def test_kept_and_mapped(tmp_path):
    cache = IndexCache([tmp_path / "c"])
    built = cache.get(DESCRIPTION, arrays, "x")
    again = IndexCache([tmp_path / "c"]).get({"seed": 42, "kind": "test"}, never, "x")
    for found in (built, again):
        assert found["pairs"].tolist() == arrays()["pairs"].tolist()
        assert found["order"].dtype == np.uint32
        with pytest.raises(ValueError, match="read-only"):
            found["order"][0] = 1
    stored = json.loads((entry_of(tmp_path / "c") / "description.json").read_text())
    assert stored["description"] == DESCRIPTION
    assert len(pickle.dumps(again)) < 1000
    assert pickle.loads(pickle.dumps(again))["order"].tolist() == [0, 1, 2, 3, 4]  # noqa: S301


def test_another_description_is_another_entry(tmp_path):
    cache = IndexCache([tmp_path])
    cache.get(DESCRIPTION, arrays, "x")
    other = cache.get({**DESCRIPTION, "seed": 43}, lambda: {"order": np.zeros(1, np.int64)}, "x")
    assert list(other) == ["order"]


def damage(entry: Path, how: str) -> None:
    match how:
        case "file missing":
            (entry / "order.npy").unlink()
        case "file cut":
            content = (entry / "pairs.npy").read_bytes()
            (entry / "pairs.npy").write_bytes(content[:-4])
        case "content changed":
            content = bytearray((entry / "pairs.npy").read_bytes())
            content[-3] ^= 1
            (entry / "pairs.npy").write_bytes(content)
        case "type changed":
            np.save(entry / "order.npy", np.arange(5, dtype=np.int64))
        case "pickled":
            np.save(entry / "order.npy", np.array([None] * 5, object), allow_pickle=True)
        case "no description":
            (entry / "description.json").unlink()
        case "half a description":
            content = (entry / "description.json").read_text()
            (entry / "description.json").write_text(content[: len(content) // 2])
        case "foreign":
            stored = json.loads((entry / "description.json").read_text())
            stored["description"]["seed"] = 1
            (entry / "description.json").write_text(json.dumps(stored))
        case "a list":
            (entry / "description.json").write_text("[]")
        case "a file in its place":
            shutil.rmtree(entry)
            entry.write_text("hello")


@pytest.mark.parametrize(
    "how",
    ["file missing", "file cut", "content changed", "type changed", "pickled", "no description", "half a description"]
    + ["foreign", "a list", "a file in its place"],
)
def test_a_damaged_entry_is_built_again(tmp_path, how):
    lines: list[str] = []
    cache = IndexCache([tmp_path], lines.append)
    cache.get(DESCRIPTION, arrays, "x")
    damage(entry_of(tmp_path), how)
    built = []

    def build():
        built.append(1)
        return arrays()

    assert cache.get(DESCRIPTION, build, "x")["pairs"].tolist() == arrays()["pairs"].tolist()
    assert built == [1]
    assert len(lines) == 1
    assert "built again" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [entry_of(tmp_path).name]
    assert cache.get(DESCRIPTION, never, "x")["order"].tolist() == [0, 1, 2, 3, 4]


def test_an_entry_cannot_name_files_elsewhere(tmp_path):
    cache = IndexCache([tmp_path], [].append)
    cache.get(DESCRIPTION, arrays, "x")
    entry = entry_of(tmp_path)
    np.save(tmp_path / "outside.npy", np.arange(5, dtype=np.uint32))
    stored = json.loads((entry / "description.json").read_text())
    stored["arrays"]["../outside"] = stored["arrays"].pop("order")
    (entry / "description.json").write_text(json.dumps(stored))
    assert set(cache.get(DESCRIPTION, arrays, "x")) == {"pairs", "order"}


def test_empty_and_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "CHECKED_BLOCK_BYTES", 64)
    cache = IndexCache([tmp_path], [].append)
    large = np.arange(4000, dtype=np.int64)  # more than 64 blocks of 64 bytes: hashed in part
    found = cache.get(DESCRIPTION, lambda: {"none": np.empty((0, 2), np.int32), "large": large}, "x")
    assert found["none"].shape == (0, 2)
    assert np.array_equal(found["large"], large)
    path = entry_of(tmp_path) / "large.npy"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))  # the last block is always hashed
    assert cache.get(DESCRIPTION, lambda: {"other": large}, "x").keys() == {"other"}


# Folders that cannot be written


def test_falls_back_to_the_next_folder_and_says_so(tmp_path):
    (tmp_path / "index-cache").write_text("a file where the folder would be")
    lines: list[str] = []
    cache = IndexCache([tmp_path / "index-cache", tmp_path / "home"], lines.append)
    cache.get(DESCRIPTION, arrays, "x")
    assert len(lines) == 1
    assert str(tmp_path / "home") in lines[0]
    assert cache.get(DESCRIPTION, never, "x")["order"].tolist() == [0, 1, 2, 3, 4]


def test_an_entry_in_a_folder_that_is_read_only_is_used(tmp_path):
    IndexCache([tmp_path / "shared"]).get(DESCRIPTION, arrays, "x")
    shared = tmp_path / "shared"
    for path in [*shared.rglob("*"), shared]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    found = IndexCache([shared, tmp_path / "home"]).get(DESCRIPTION, never, "x")
    assert found["order"].tolist() == [0, 1, 2, 3, 4]
    assert not (tmp_path / "home").exists()
    for path in [shared, *shared.rglob("*")]:
        path.chmod(0o755)


def test_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    assert IndexCache.beside(tmp_path / "data" / "a").folders == [
        tmp_path / "data" / "index-cache",
        tmp_path / "home" / "index-cache",
    ]
    assert IndexCache.beside(tmp_path / "a", str(tmp_path / "c")).folders == [tmp_path / "c"]


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data_cache"):
        IndexCache([tmp_path / "file" / "c"]).get(DESCRIPTION, arrays, "x")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "_flush", full)
        with pytest.raises(DataError, match="disk is full"):
            IndexCache([tmp_path]).get(DESCRIPTION, arrays, "x")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert IndexCache([tmp_path]).get(DESCRIPTION, arrays, "x")["order"].tolist() == [0, 1, 2, 3, 4]


def test_without_file_locks_every_process_builds(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(index_cache.fcntl, "flock", no_locks)
    lines: list[str] = []
    cache = IndexCache([tmp_path], lines.append)

    def build_while_another_finishes():
        monkeypatch.undo()
        IndexCache([tmp_path]).get(DESCRIPTION, arrays, "x")
        return arrays()

    assert cache.get(DESCRIPTION, build_while_another_finishes, "x")["order"].tolist() == [0, 1, 2, 3, 4]
    assert "no file lock" in lines[0]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


# Several processes

PROCESS = """
import os, sys, time
from pathlib import Path
import numpy as np
from arriero.data.corpus import index_cache
from arriero.data.corpus.index_cache import IndexCache
folder, log, seconds, kill = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
def build():
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    return {"order": np.arange(1000, dtype=np.int64), "other": np.arange(7, dtype=np.int32)}
if kill == "while writing":
    flush = index_cache._flush
    def stop_here(file):
        flush(file)
        if file.name.endswith("other.npy"):
            Path(log + ".writing").touch()
            time.sleep(60)
    index_cache._flush = stop_here
found = IndexCache([folder], notice_seconds=0.2).get({"kind": "race"}, build, "corpus")
print(int(found["order"].sum()), len(found["other"]))
"""


def start(folder: Path, log: Path, seconds: float, kill: str = "no") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder), str(log), str(seconds), kill],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_processes_that_race_build_once(tmp_path):
    log = tmp_path / "log"
    racers = [start(tmp_path / "c", log, 1.5) for _ in range(4)]
    results = [racer.communicate(timeout=60) for racer in racers]
    assert {out for out, _ in results} == {f"{sum(range(1000))} 7\n"}, results
    (builder,) = log.read_text().split()
    waited = [errors for _, errors in results if "waiting for the indexes of corpus" in errors]
    assert waited
    assert all(f"process {builder} on " in errors for errors in waited)


@pytest.mark.parametrize("moment", ["while building", "while writing"])
def test_kill_in_the_middle(tmp_path, moment):
    """The kernel drops a killed builder's lock: the process that waits goes on at once, and nothing half is found."""
    folder, log = tmp_path / "c", tmp_path / "log"
    builder = start(folder, log, 60 if moment == "while building" else 0, moment)
    sign = log if moment == "while building" else Path(f"{log}.writing")
    wait_for(sign.exists, "the builder did not begin")
    waiting = start(folder, log, 0)
    assert waiting.stderr is not None
    assert "waiting for the indexes of corpus" in waiting.stderr.readline()
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    out, errors = waiting.communicate(timeout=60)
    assert out == f"{sum(range(1000))} 7\n", errors
    assert len(log.read_text().split()) == 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
