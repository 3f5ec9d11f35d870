"""Reading what may be hostile under watch: nothing is run, nothing elsewhere is opened, little memory and time are taken."""

from __future__ import annotations

import os
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.errors import FormatError

# What no reader of data has any use for.
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.remove", "os.rename", "os.chmod"}
FORBIDDEN |= {
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
    "socket.connect",
    "socket.bind",
    "shutil.rmtree",
}
SECONDS = 60.0  # generous, as other tests may run beside
TENSOR_BYTES = 256 * 2**20  # above what the process has: room for torch's own allocations, small beside any bomb

_folder: Path | None = None
_seen: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _folder is None:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        path, home = os.path.realpath(os.fsdecode(arguments[0])), os.path.realpath(_folder)
        beside = path.startswith(os.path.dirname(home) + os.sep) and not path.startswith(home + os.sep) and path != home
        if beside or path.startswith("/etc/"):
            _seen.append(f"open {path}")


sys.addaudithook(_watch)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let a large allocation fail with an error that no reader turns into one line."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + TENSOR_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_watched(read: Callable[[Path], object], folder: Path) -> str:
    """Read a folder that lies alone in another one.

    Returns:
        Why it was refused, "" if it was read.
    """
    global _folder
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    message = ""
    with _limited_memory():
        tracemalloc.start()
        begin = time.perf_counter()
        _folder = folder
        try:
            read(folder)
        except FormatError as error:
            message = str(error) or "no reason"
        finally:
            _folder = None
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    seen, _seen[:] = list(_seen), []
    assert not seen, seen
    assert time.perf_counter() - begin < SECONDS
    assert peak < 2 * size + 16 * 2**20, f"{peak} bytes taken for {size}"
    assert "\n" not in message, message
    assert len(message) < 1500 + 2 * size, message[:300]
    return message
