"""The real command: the same bytes from any number of workers, after kills, from shards and from Ray; its memory."""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

Arriero = Callable[..., subprocess.CompletedProcess[str]]
# The command, with units of 16 KiB so that a small corpus has many.
SMALL_UNITS = """
import sys
from arriero.data.corpus import units
units.UNIT_BYTES = 16384
from arriero.cli import main
if __name__ == "__main__":
    code = main(sys.argv[1:])
    if "--peak" in __file__:
        # Not getrusage: its peak begins with that of the process that started this one.
        print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
    raise SystemExit(code)
"""


def write_documents(path: Path, megabytes: float, seed: int = 1) -> None:
    """JSON lines of about a kB each, some of them equal."""
    source = random.Random(seed)
    words = ["".join(source.choices("etaoinshrdlu", k=source.randint(1, 9))) for _ in range(500)]
    lines: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        text = " ".join(source.choices(words, k=source.randint(20, 300)))
        lines.append(lines[-3] if len(lines) % 50 == 49 else json.dumps({"text": text}) + "\n")
        size += len(lines[-1])
    path.write_text("".join(lines), encoding="utf-8")


def command(data: Path, prefix: Path, *more: str) -> list[str]:
    return [
        *("preprocess", "--model_name_or_path", model(), "--input_path", str(data), "--output_prefix", str(prefix)),
        *("--append_eos", "--deduplicate", *more),
    ]


@functools.cache
def model() -> str:
    """The folder of a small tokenizer; from a folder the command starts at once, without torch."""
    from arriero.formats.download import resolve_model

    return str(resolve_model("__internal_testing__/tiny-random-llama"))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "small_units.py"
    path.write_text(SMALL_UNITS, encoding="utf-8")
    return path


def files_of(prefix: Path) -> dict[str, bytes]:
    names = ("_ids.npy", "_idx.npz", "_meta.json")
    return {name: Path(f"{prefix}{name}").read_bytes() for name in names}


def run_script(script: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_user_makes_a_corpus(arriero: Arriero, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 0.3)
    (tmp_path / "b.txt").write_text("First document.\nGoes on.\n\nSecond one.\n", encoding="utf-8")
    (tmp_path / "notes.md").touch()
    done = arriero(*command(tmp_path, tmp_path / "out" / "c", "--log_interval", "1"))
    assert done.returncode == 0, done.stderr
    ids = np.load(tmp_path / "out" / "c_ids.npy", mmap_mode="r", allow_pickle=False)
    with np.load(tmp_path / "out" / "c_idx.npz", allow_pickle=False) as index:
        lens, docs = index["lens"], index["docs"]
    assert re.search(rf"^{len(lens):,} documents, {len(lens):,} sentences, {len(ids):,} tokens", done.stdout)
    assert re.search(r"left out of [\d,]+ documents read: [\d,]+ duplicates", done.stdout)
    assert "skipped 1 of other kinds: notes.md" in done.stderr
    assert docs.tolist() == list(range(len(lens) + 1))
    assert (ids[np.cumsum(lens) - 1] == ids[-1]).all()


def test_any_number_of_workers_makes_the_same_bytes(script: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "x.jsonl", 0.8)
    for workers in (1, 2, 3):
        run_script(script, *command(tmp_path / "x.jsonl", tmp_path / f"out{workers}" / "c", "--workers", str(workers)))
    expected = files_of(tmp_path / "out1" / "c")
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[500] = lines[700] = "{}\n"
    (tmp_path / "bad.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = command(tmp_path / "bad.jsonl", tmp_path / "bad" / "c", "--workers", "2")
    done = subprocess.run([sys.executable, str(script), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bad.jsonl: line 501 has no field 'text'" in done.stderr
    assert files_of(tmp_path / "out2" / "c") == expected
    assert files_of(tmp_path / "out3" / "c") == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(script: Path, tmp_path: Path, workers: int) -> None:
    data = tmp_path / "x.jsonl.gz"
    write_documents(tmp_path / "x.jsonl", 3)
    data.write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes(), compresslevel=1))
    run_script(script, *command(data, tmp_path / "whole" / "c"))
    torn = tmp_path / "torn" / "c"
    journal = tmp_path / "torn" / ".c.partial" / "journal"
    moments = random.Random(workers)
    kills = 0
    reached = 0
    while kills < 3:
        process = subprocess.Popen(
            [sys.executable, str(script), *command(data, torn, "--workers", str(workers))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Until it wrote something, then anywhere within the next units.
        while process.poll() is None and not (journal.is_file() and journal.stat().st_size > reached):
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.08))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert process.poll() is None, f"ended after {kills} kills: make the corpus longer"
        process.kill()
        process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, "a worker outlived its parent"
        assert not list((tmp_path / "torn").glob("c_*"))
        kills += 1
        reached = journal.stat().st_size
    done = subprocess.run(
        [sys.executable, str(script), *command(data, torn, "--workers", str(workers))],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "going on after" in done.stderr
    assert files_of(torn) == files_of(tmp_path / "whole" / "c")
    assert not journal.parent.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_it_as_ctrl_c_does(script: Path, tmp_path: Path, workers: int) -> None:
    write_documents(tmp_path / "x.jsonl", 3)
    given = [sys.executable, str(script), *command(tmp_path / "x.jsonl", tmp_path / "c", "--workers", str(workers))]
    journal = tmp_path / ".c.partial" / "journal"
    with subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.is_file() and journal.stat().st_size):
            time.sleep(0.005)
        workers_of_it = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert told.splitlines()[-1] == "arriero: asked to end (SIGTERM)"
    assert "resource_tracker" not in told
    _, alive = psutil.wait_procs(workers_of_it, timeout=20)
    assert not alive
    assert journal.stat().st_size  # to go on from


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_input(script: Path, tmp_path: Path) -> None:
    watched = script.with_name("small_units--peak.py")
    watched.write_text(SMALL_UNITS, encoding="utf-8")
    peaks = {}
    for megabytes in (1, 10):
        data = tmp_path / f"{megabytes}.jsonl"
        write_documents(data, megabytes)
        output = run_script(watched, *command(data, tmp_path / f"out{megabytes}" / "c"))
        peaks[megabytes] = int(re.findall(r"^VmHWM:\s+(\d+) kB$", output, re.MULTILINE)[0]) / 1024
    # 9 MB more of text: as Python strings, token lists or arrays they would take from 8 to over 100 MiB.
    assert peaks[10] - peaks[1] < 4, peaks


def test_shards_on_the_command_line(script: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "x.jsonl", 0.4)
    run_script(script, *command(tmp_path / "x.jsonl", tmp_path / "whole" / "c"))
    cut = tmp_path / "cut" / "c"
    for shard_id in range(2):
        run_script(script, *command(tmp_path / "x.jsonl", cut, "--num_shards", "2", "--shard_id", str(shard_id)))
    run_script(script, *command(tmp_path / "x.jsonl", cut, "--num_shards", "2", "--merge_shards"))
    assert files_of(cut) == files_of(tmp_path / "whole" / "c")
    assert len(list(cut.parent.iterdir())) == 3


def test_errors_are_one_line_and_leave_nothing(arriero: Arriero, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n', encoding="utf-8")
    (tmp_path / "file").touch()
    cases = {
        ("--input_path", "x.jsonl"): "x.jsonl: line 3 has no field 'text'; its fields: txt; name one by --json_key",
        ("--input_path", "absent"): "--input_path absent: no such file or folder",
        ("--output_prefix", "file/c"): "cannot be written",
        ("--output_prefix", "/proc/arriero/c"): "cannot be written",
        ("--output_prefix", "out/"): "is a folder",
        ("--num_shards", "2", "--shard_id", "2"): "--shard_id 2 is not below --num_shards 2",
        ("--num_shards", "3", "--merge_shards"): "of the 3 shards of",
    }
    for arguments, message in cases.items():
        done = arriero(
            *("preprocess", "--model_name_or_path", model(), "--input_path", "x.jsonl", "--output_prefix", "out/c"),
            *arguments,
            cwd=tmp_path,
        )
        assert done.returncode == 2, (arguments, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("arriero: ")
        assert message in lines[0]
        assert not list((tmp_path / "out").glob("c*"))


def test_ray_makes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from arriero.config.preprocessing import PreprocessOptions
    from arriero.data.corpus import units
    from arriero.data.corpus.build import CorpusBuilder

    monkeypatch.setattr(units, "UNIT_BYTES", 16384)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    write_documents(tmp_path / "x.jsonl", 0.5)
    bad = tmp_path / "bad.jsonl"
    bad.write_text((tmp_path / "x.jsonl").read_text(encoding="utf-8") + "no JSON\n", encoding="utf-8")

    def build(data: Path, prefix: Path, executor: str) -> None:
        options = PreprocessOptions(
            model_name_or_path=model(),
            input_path=str(data),
            output_prefix=str(prefix),
            deduplicate=True,
            workers=2,
            executor=executor,
        )
        CorpusBuilder(options, report=lambda line: None).build()

    build(tmp_path / "x.jsonl", tmp_path / "local" / "c", "local")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1"
    )
    try:
        build(tmp_path / "x.jsonl", tmp_path / "ray" / "c", "ray")
        assert files_of(tmp_path / "ray" / "c") == files_of(tmp_path / "local" / "c")
        from arriero.errors import DataError

        lines = len(bad.read_text(encoding="utf-8").splitlines())
        with pytest.raises(DataError, match=rf"bad\.jsonl: line {lines} is not JSON"):
            build(bad, tmp_path / "bad" / "c", "ray")
        assert ray.is_initialized(), "a cluster that the caller started is the caller's to stop"
    finally:
        ray.shutdown()


def test_without_ray_the_extra_is_named(arriero: Arriero, tmp_path: Path) -> None:
    write_documents(tmp_path / "x.jsonl", 0.01)
    (tmp_path / "ray.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2] / "src")])
    done = arriero(*command(tmp_path / "x.jsonl", tmp_path / "out" / "c", "--executor", "ray"), PYTHONPATH=path)
    assert done.returncode == 2
    assert "pip install 'arriero[ray]'" in done.stderr
