"""How a launched process tells the launcher, in a small JSON file, what ended it. Imports no torch.

The launcher names the file in `ARRIERO_ERROR_FILE`. The process prints no error itself then: of several processes that end
for one reason, the launcher shows the one that failed first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from arriero.errors import ArrieroError, PeerError, RunStopped

ERROR_FILE = "ARRIERO_ERROR_FILE"
_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed, by name
_PEER_WORDS = re.compile(
    r"\bgloo\b|\bNCCL\b|Connection (closed|reset) by peer|Timed out waiting \d+ ?ms", re.IGNORECASE
)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a process ended.

    Attributes:
        time: when, in seconds since 1970.
        message: the line to show; empty if there is nothing to say.
        exit_code: of the process.
        of_peer: whether it failed only because another process did.
        stopped: whether it was told to end, and did: no failure.
        traceback: with `--debug`.
    """

    time: float
    message: str
    exit_code: int
    of_peer: bool = False
    stopped: bool = False
    traceback: str = ""

    @property
    def failed(self) -> bool:
        """Whether this process is where things went wrong."""
        return not self.of_peer and not self.stopped

    def write(self, path: Path) -> None:
        """Write it in one piece: the launcher may be reading."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> Report | None:
        """What a process has written; None if it has not."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Report(**{field.name: values[field.name] for field in fields(Report)})


def take_error_file() -> Path | None:
    """Where the launcher expects the report of this process; None without a launcher.

    The variable is removed, so that what this process starts does not write there. Where the system can, this process
    is asked to end (SIGTERM) if the launcher is killed.
    """
    named = os.environ.pop(ERROR_FILE, None)
    if named is None:
        return None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    return Path(named)


def report_of(error: BaseException, message: str, exit_code: int, traceback: str) -> Report:
    """The report of an exception.

    Args:
        error: what ended the process.
        message: the line that a lone process would print.
        exit_code: that a lone process would have.
        traceback: to be shown before the line; may be empty.
    """
    now = time.time()
    if isinstance(error, RunStopped | KeyboardInterrupt | BrokenPipeError):
        return Report(time=now, message=message, exit_code=exit_code, stopped=True, traceback=traceback)
    if not says_peer(error):
        return Report(time=now, message=message, exit_code=exit_code, traceback=traceback)
    own = next((cause for cause in _causes(error) if isinstance(cause, ArrieroError) and not says_peer(cause)), None)
    if own is not None:  # it failed, and the others were gone before it could tell them
        stopped = isinstance(own, RunStopped)
        return Report(time=now, message=one_line(own), exit_code=own.exit_code, stopped=stopped, traceback=traceback)
    if not isinstance(error, ArrieroError):
        message = f"another process of this run ended or does not answer ({one_line(error)[:300]})"
        exit_code = PeerError.exit_code
    return Report(time=now, message=message, exit_code=exit_code, of_peer=True, traceback=traceback)


def leave(report: Report) -> int:
    """The exit code of a process that has reported; where it has not parted from others in order this does not return.

    Threads of gloo and NCCL that wait for a process which is gone make the ordinary end of Python hang or abort.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(report.exit_code)
    return report.exit_code


def says_peer(error: BaseException) -> bool:
    """Whether an exception, or the one it was raised from, says that another process is gone or silent."""
    if isinstance(error, PeerError) or type(error).__name__ in _PEER_TYPES:
        return True
    if isinstance(error, RuntimeError | ConnectionError) and is_about_peers(str(error)):
        return True
    return error.__cause__ is not None and says_peer(error.__cause__)


def is_about_peers(text: str) -> bool:
    """Whether a message of gloo or NCCL is about a process that is gone or silent."""
    return _PEER_WORDS.search(text) is not None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause = error.__cause__ or error.__context__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def last_line(path: Path) -> str:
    """The last line of a text file that is not blank; empty if there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")
    return ""
