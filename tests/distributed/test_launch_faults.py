"""`arriero launch`: real processes that meet, fail, are killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import Launcher

PROBE = Path(__file__).with_name("launched_probe.py")
SOURCE = Path(__file__).parents[2] / "src"
Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("killed", processes=2, ...)`: a launcher in `tmp_path`; whatever is left of it at the end is killed."""
    launchers: list[Launcher] = []

    def call(what: str, **job: Any) -> Launcher:
        variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ARRIERO_TIMEOUT": "30"}
        job = {"processes": 2, **job}
        launcher = Launcher(str(PROBE), "--launch", json.dumps(job), what, cwd=tmp_path, env=variables)
        launchers.append(launcher)
        return launcher

    yield call
    for launcher in launchers:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
            launcher.communicate()


def end(launcher: Launcher) -> tuple[int, list[str], list[str]]:
    """Its exit code and the lines of its stdout and stderr."""
    out, err = launcher.communicate(timeout=100)
    return launcher.returncode, out.splitlines(), err.splitlines()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} do not appear"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_all_is_well_and_nothing_listens_to_other_machines(start: Start, tmp_path: Path) -> None:
    code, out, err = end(start("meet", log_dir=str(tmp_path)))
    assert (code, err) == (0, [])
    assert out == ["rank 0 of 2 restart 0", "a warning of rank 0", "listens on 127.0.0.1", "sum 2"]
    for rank in (0, 1):
        log = (tmp_path / f"workerlog.{rank}").read_text().splitlines()
        assert log == [f"rank {rank} of 2 restart 0", f"a warning of rank {rank}", "listens on 127.0.0.1", "sum 2"]


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("user_error", 2, "row 7 has no text: mend it"),
        ("peer_first", 2, "no rows"),
        ("defect", 1, "internal error: RuntimeError: a bug (run it again with --debug for the traceback)"),
        ("killed", 137, "killed by SIGKILL (out of memory?)"),
        ("silent_exit", 7, "ended with exit code 7: the disk is on fire"),
    ],
)
def test_the_one_to_blame_is_named_last_and_alone(
    start: Start, tmp_path: Path, what: str, code: int, line: str
) -> None:
    (tmp_path / "log").mkdir()
    # An error of the user is not tried again, whatever --max_restarts says.
    restarts = 3 if code == 2 else 0
    assert end(start(what, log_dir=str(tmp_path / "log"), max_restarts=restarts)) == (
        code,
        ["rank 0 of 2 restart 0", "a warning of rank 0"],
        [f"arriero [rank 1]: {line}"],
    )
    log = (tmp_path / "log" / "workerlog.1").read_text().splitlines()
    assert log[0] == "rank 1 of 2 restart 0"
    assert log[-1] == f"arriero [rank 1]: {line}"
    other = (tmp_path / "log" / "workerlog.0").read_text()
    assert "rank 1" not in other or "arriero [rank 0]: " in other


def test_one_that_does_not_notice_is_ended_within_seconds(start: Start) -> None:
    launcher = start("deaf")
    assert launcher.stdout.readline() == "rank 0 of 2 restart 0\n"
    before = time.monotonic()
    code, _, err = end(launcher)
    assert (code, err[-1]) == (137, "arriero [rank 1]: killed by SIGKILL (out of memory?)")
    assert time.monotonic() - before < 20


def test_debug_keeps_the_traceback(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_DEBUG", "1")
    code, _, err = end(start("defect"))
    assert (code, err[-1]) == (1, "arriero [rank 1]: internal error: RuntimeError: a bug")
    assert err.count("Traceback (most recent call last):") == 1
    assert err[-2] == "RuntimeError: a bug"


def test_all_are_started_again_after_a_death(start: Start, tmp_path: Path) -> None:
    code, out, err = end(start("once", log_dir=str(tmp_path), max_restarts=2))
    assert code == 0
    assert [line for line in out if "warning" not in line] == [
        "rank 0 of 2 restart 0",
        "rank 0 of 2 restart 1",
        "sum 2",
    ]
    assert err == ["arriero [rank 1]: killed by SIGKILL (out of memory?); all processes are started again (1 of 2)"]
    log = (tmp_path / "workerlog.1").read_text()
    assert log.index("restart 0") < log.index("killed by SIGKILL") < log.index("restart 1") < log.index("sum 2")


def test_the_last_restart_is_the_last(start: Start) -> None:
    code, _, err = end(start("silent_exit", max_restarts=1))
    assert code == 7
    assert [line for line in err if line.startswith("arriero")] == [
        "arriero [rank 1]: ended with exit code 7: the disk is on fire; all processes are started again (1 of 1)",
        "arriero [rank 1]: ended with exit code 7: the disk is on fire",
    ]


@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [("SIGTERM", "SIGTERM", 0), ("SIGINT", "SIGINT", 130), ("SIGHUP", "SIGTERM", 0)],
)
def test_a_signal_reaches_every_process_once_and_they_end_in_order(
    start: Start, tmp_path: Path, sent: str, received: str, code: int
) -> None:
    launcher = start("stop", max_restarts=2)
    wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
    os.killpg(launcher.pid, signal.Signals[sent])  # as a terminal does: to the launcher's whole group
    ended = end(launcher)
    assert (ended[0], ended[2][-1]) == (code, "arriero: stopped after step 3")
    for rank in (0, 1):
        assert json.loads((tmp_path / f"caught.{rank}").read_text()) == [signal.Signals[received]]


def test_a_verb_that_does_not_listen_to_a_signal_is_ended_by_it(start: Start, tmp_path: Path) -> None:
    launcher = start("sleep")
    wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
    launcher.send_signal(signal.SIGTERM)
    code, _, err = end(launcher)
    assert (code, err) == (143, ["a warning of rank 0", "arriero: asked to end (SIGTERM)"])


def test_a_killed_launcher_leaves_no_process(start: Start, tmp_path: Path) -> None:
    launcher = start("sleep")
    ready = [tmp_path / "ready.0", tmp_path / "ready.1"]
    wait_for(*ready)
    launcher.kill()
    end(launcher)
    deadline = time.monotonic() + 20
    while not all(gone(int(path.read_text())) for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_port_that_is_taken(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = end(start("meet", meeting={"port": port}))
    assert (code, out) == (2, [])
    assert err == [f"arriero: port {port} is in use on this machine: give another one by --master"]


@pytest.mark.parametrize("numbered", [pytest.param(True, marks=pytest.mark.peers), False])
def test_two_machines_meet_and_start_again_together(start: Start, tmp_path: Path, numbered: bool) -> None:
    """Two launchers play two machines; rank 1, on the second or the first, is killed the first time."""
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    launchers = [
        start(
            "once",
            processes=1,
            max_restarts=2,
            log_dir=str(tmp_path),
            meeting={**place, **({"machine": machine} if numbered else {})},
        )
        for machine in (0, 1)
    ]
    ended = [end(launcher) for launcher in launchers]
    assert [code for code, _, _ in ended] == [0, 0], ended
    lines = [line for _, out, _ in ended for line in out if "warning" not in line]
    assert lines == ["rank 0 of 2 restart 0", "rank 0 of 2 restart 1", "sum 2"]
    assert (tmp_path / "workerlog.1").read_text().splitlines()[-1] == "sum 2"
    if numbered:  # rank 0 is on machine 0
        assert ended[1][1] == []


def test_an_error_on_one_machine_ends_the_other(start: Start) -> None:
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    first, second = (start("user_error", processes=1, max_restarts=2, meeting={**place, "machine": m}) for m in (0, 1))
    code, _, err = end(second)
    assert (code, err[-1]) == (2, "arriero [rank 1]: row 7 has no text: mend it")
    code, _, err = end(first)
    assert code == 2
    assert err[-1].startswith("arriero [rank 0]: another process of this run ended or does not answer")


def test_a_machine_that_fails_at_the_start_ends_the_others_within_seconds(start: Start) -> None:
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    first, second = (
        start("fails_at_start", processes=1, max_restarts=2, meeting={**place, "machine": m}) for m in (0, 1)
    )
    code, _, err = end(second)
    assert (code, err[-1]) == (2, "arriero [rank 1]: no such model")
    before = time.monotonic()
    code, _, err = end(first)
    assert (code, err[-1]) == (2, "arriero: machine 1 has ended this run: its launcher says why")
    assert time.monotonic() - before < 15


@pytest.mark.parametrize(
    ("lost", "name"), [(0, "machine 0 (127.0.0.1)"), pytest.param(1, "machine 1", marks=pytest.mark.peers)]
)
def test_a_stop_that_a_lost_machine_caused_is_no_good_end(start: Start, tmp_path: Path, lost: int, name: str) -> None:
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    launchers = [start("stop_together", processes=1, max_restarts=2, meeting={**place, "machine": m}) for m in (0, 1)]
    wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
    launchers[lost].kill()
    code, _, err = end(launchers[1 - lost])
    assert (code, err[-1]) == (2, f"arriero: {name} is gone or was told to end (stopped after step 3)")


def test_two_machines_that_are_both_told_to_stop_end_well(start: Start, tmp_path: Path) -> None:
    """Though the second hears of it after its process has stopped."""
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    launchers = [start("stop_together", processes=1, meeting={**place, "machine": m}) for m in (0, 1)]
    wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
    launchers[0].terminate()
    time.sleep(1.0)
    launchers[1].terminate()
    ended = [end(launcher) for launcher in launchers]
    assert [(code, err[-1]) for code, _, err in ended] == [(0, "arriero: stopped after step 3")] * 2


def test_a_wait_for_other_machines_is_told_and_can_be_ended(start: Start) -> None:
    place = {"fewest": 2, "most": 2, "address": "127.0.0.1", "port": free_port()}
    second = start("meet", processes=1, meeting={**place, "machine": 1})
    first = start("meet", processes=1, meeting={**place, "port": free_port(), "machine": 0})
    assert second.stderr.readline() == f"arriero: waiting for machine 0 at 127.0.0.1:{place['port']}\n"
    second.terminate()
    assert end(second) == (143, [], ["arriero: asked to end (SIGTERM)"])
    assert first.stderr.readline() == "arriero: 1 of 2 machines are here; waiting for the others\n"
    first.terminate()
    assert end(first) == (143, [], ["arriero: asked to end (SIGTERM)"])


@pytest.mark.peers  # the rendezvous waits 30 s for more machines
def test_a_machine_that_joins_later_stops_the_others_in_order_and_starts_with_them(
    start: Start, tmp_path: Path
) -> None:
    place = {"fewest": 1, "most": 2, "address": "127.0.0.1", "port": free_port()}
    first = start("stop", processes=1, meeting=place)
    wait_for(tmp_path / "ready.0")
    (tmp_path / "ready.0").unlink()
    second = start("stop", processes=1, meeting=place)
    wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
    assert json.loads((tmp_path / "caught.0").read_text()) == [signal.SIGTERM]
    for launcher in (first, second):
        launcher.terminate()
    ended = [end(launcher) for launcher in (first, second)]
    assert [code for code, _, _ in ended] == [0, 0]
    lines = [line for _, out, _ in ended for line in out]
    assert lines == ["rank 0 of 1 restart 0", "rank 0 of 2 restart 1"]
