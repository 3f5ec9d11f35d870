"""One launched process: its start, its output, its end. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from arriero.parallel.launching.report import ERROR_FILE, Report, is_about_peers, last_line


@dataclass
class RankProcess:
    """A process and where its output goes.

    It has a session of its own, so that a Ctrl-C reaches it once: through the launcher.

    Attributes:
        rank: its number among all processes of the run.
        command: its command line.
        environment: its variables.
        scratch: a folder for the report, and without a log for the errors of a process that is not shown.
        log: the file of its stdout and stderr; None for no log.
        append: whether what the log holds already stays.
        shown: whether its output goes to the terminal too (without a log: only there).
    """

    rank: int
    command: list[str]
    environment: dict[str, str]
    scratch: Path
    log: Path | None = None
    append: bool = False
    shown: bool = False
    signals: list[int] = field(default_factory=list)
    dismissed: float | None = None
    _process: subprocess.Popen[bytes] | None = None
    _ended: float | None = None
    _tail: _Tail | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it."""
        variables = {**self.environment, ERROR_FILE: str(self._report_file)}
        out: int | None = None if self.shown else subprocess.DEVNULL
        with contextlib.ExitStack() as files:
            err = out
            if self._output is not None:
                file = files.enter_context(self._output.open("ab" if self.append else "wb"))
                err = file.fileno()
                if self.log is not None:
                    out = err
                    variables.setdefault("PYTHONUNBUFFERED", "1")  # the log is read while it is written
                    if self.shown:
                        self._tail = _Tail(self.log, file.seek(0, os.SEEK_END))
            # stdin: the terminal belongs to the launcher.
            self._process = subprocess.Popen(
                self.command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        if self._tail is not None:
            self._tail.start()

    @property
    def running(self) -> bool:
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._ended = self._ended or time.time()
        return False

    def send(self, number: int) -> None:
        """Send a signal to it (not to what it has started), if it runs."""
        if self.running:
            self.signals.append(number)
            self._process_of().send_signal(number)

    def dismiss(self) -> None:
        """Ask it to end (SIGTERM) because another has failed: what ends it now is no failure of its own."""
        if self.running:
            self.dismissed = self.dismissed or time.time()
            self._process_of().terminate()

    def kill(self) -> None:
        """End it, and what it has started, at once."""
        if self.running:
            self.dismissed = self.dismissed or time.time()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # none of them is left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def report(self) -> Report | None:
        """How it ended; None if it runs and has reported nothing, if all went well, or if it was dismissed."""
        told = Report.read(self._report_file)
        if told is not None:
            late = self.dismissed is not None and told.time >= self.dismissed
            return None if late else told
        if self.running or self._process is None or self.dismissed is not None:
            return None
        code = self._process_of().returncode
        ended = self._ended or time.time()
        if code == 0:
            return None
        said = last_line(self._output)[:300] if self._output is not None else ""
        if code > 0:
            hint = f": {said}" if said else " and gave no reason"
            return Report(
                time=ended, message=f"ended with exit code {code}{hint}", exit_code=code, of_peer=is_about_peers(said)
            )
        number = -code
        if number in self.signals:
            asked = f"asked to end ({signal.Signals(number).name})"
            return Report(time=ended, message=asked, exit_code=128 + number, stopped=True)
        message = f"killed by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            message += " (out of memory?)"
        elif number != signal.SIGTERM and said:
            message += f": {said}"
        of_peer = number == signal.SIGABRT and is_about_peers(said)
        return Report(time=ended, message=message, exit_code=128 + number, of_peer=of_peer)

    def close(self, prefix: str) -> None:
        """After its end: show the rest of its output, and close its log with its error after `prefix`."""
        if self._tail is not None:
            self._tail.finish()
        report = self.report()
        if self.log is not None and report is not None and report.message:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{report.traceback}{prefix}{report.message}\n")
        self._report_file.unlink(missing_ok=True)

    @property
    def _report_file(self) -> Path:
        return self.scratch / f"report.{self.rank}.json"

    @property
    def _output(self) -> Path | None:
        """The file that its stderr goes to."""
        return self.log or (None if self.shown else self.scratch / f"stderr.{self.rank}")

    def _process_of(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process


class _Tail(threading.Thread):
    """Copies to the terminal what is added to a file."""

    def __init__(self, path: Path, start: int) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.position = start
        self.over = threading.Event()

    def run(self) -> None:
        with self.path.open("rb") as file, contextlib.suppress(BrokenPipeError):  # the log goes on without a reader
            file.seek(self.position)
            while True:
                last = self.over.is_set()
                while chunk := file.read(65536):
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()
                if last:
                    return
                self.over.wait(0.05)

    def finish(self) -> None:
        """Copy the rest."""
        self.over.set()
        self.join()
