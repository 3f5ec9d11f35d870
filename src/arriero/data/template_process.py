"""The process that renders chat templates: a program of its own (`template_worker`), with limits of time, memory and output."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import TemplateError

OUTPUT_LIMIT = 8 * 2**20
CPU_SECONDS = 2.0
# Only if the worker's own timer fails or does not exist; long, since it also runs while the machine is busy elsewhere.
WALL_SECONDS = 20.0
# What the worker may know of this process's environment: nothing secret.
INHERITED_VARIABLES = ("PATH", "TZ", "LANG", "LC_ALL", "SYSTEMROOT")


class TemplateWorker:
    """The process that renders. Started when first needed; started anew after a template made it end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._deadline: float | None = None  # of the request that is being answered

    def render(
        self,
        source: str,
        variables: Mapping[str, Any],
        seconds: float = CPU_SECONDS,
        generation_marks: tuple[str, str] | None = None,
    ) -> str:
        """The text of a template.

        Args:
            generation_marks: what is written before and after each `{% generation %}` block.

        Raises:
            TemplateError: with the bare reason.
        """
        request = {
            "source": source,
            "variables": variables,
            "seconds": seconds,
            "output_limit": OUTPUT_LIMIT,
            "generation_marks": generation_marks,
        }
        try:
            line = json.dumps(request).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages hold what JSON cannot ({error})") from error
        with self._lock:
            answer = self._exchange(line)
        if not answer:
            raise TemplateError(f"it ran longer than {seconds:g} s, or used up the renderer's memory")
        reply = json.loads(answer)
        if "error" in reply:
            raise TemplateError(_one_line(str(reply["error"])))
        text: str = reply["text"]
        return text

    def close(self) -> None:
        """End the process."""
        # After a fork the parent's worker is not ours to end, nor may its pipes be shared.
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _exchange(self, line: bytes) -> bytes:
        """One request and its answer; b"" if the process died over it."""
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self.close()
        if self._process is None:
            self._process = self._start()
            self._owner = os.getpid()
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._deadline = time.monotonic() + WALL_SECONDS
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it died while the request was written
            answer = b""
        except BaseException:  # such as Ctrl-C: an answer that nobody took would be the next request's
            self.close()
            raise
        finally:
            self._deadline = None
        if not answer.endswith(b"\n"):
            self.close()
            return b""
        return answer

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End a process that overruns; one thread for its whole life, since one for each request costs more than rendering."""
        while process.poll() is None:
            time.sleep(1.0)
            deadline = self._deadline
            if self._process is process and deadline is not None and time.monotonic() > deadline:
                process.kill()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        # -P: this folder must not shadow other modules; the parent's path, so that its jinja2 is found.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        program = Path(__file__).with_name("template_worker.py")
        try:
            return subprocess.Popen(
                [sys.executable, "-P", str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                # Its own group: Ctrl-C in the terminal is for the parent.
                start_new_session=True,
            )
        except OSError as error:
            raise TemplateError(f"the renderer cannot be started ({error})") from error


def _one_line(reason: str) -> str:
    """What a template gave as its reason, without what would steer a terminal."""
    line = " ".join(reason.split())[:500]
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


WORKER = TemplateWorker()
atexit.register(WORKER.close)


def _new_lock_after_fork() -> None:
    # The child may have been forked while another thread held the lock.
    WORKER._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_after_fork)
