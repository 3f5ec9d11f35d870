"""What the page's process says on its standard error, as lines of the server's log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from arriero.serving.request_log import JsonLog

MAX_LINES_A_MINUTE = 20
MAX_LINE = 500  # bytes
OWN = "arriero: "  # how an error of arriero's own begins, which is one line for whoever runs the server
# The last line of a traceback; what follows the colon may be what somebody typed.
EXCEPTION = re.compile(
    r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Exit|Timeout|Disconnect))(?::|$)"
)


class PageLog:
    """Takes what comes piece by piece. Errors of arriero's own are told whole, of others the kind of the exception and nothing
    more: their messages and tracebacks hold conversations, which `--log_prompts` alone may write down, megabytes of them."""

    def __init__(self, log: JsonLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._held = b""
        self._minute, self._lines, self._left_out = clock(), 0, 0

    def push(self, data: bytes) -> None:
        """Take some more."""
        first, *others = data.split(b"\n")
        self._take(first)
        for line in others:
            self._end()
            self._take(line)

    def finish(self) -> None:
        """There comes nothing more."""
        self._end()
        self._tell_left_out()

    def _take(self, data: bytes) -> None:
        self._held = (self._held + data[:MAX_LINE])[:MAX_LINE]

    def _end(self) -> None:
        line, self._held = self._held.decode("utf-8", "replace").rstrip(), b""
        if line.startswith(OWN):
            self._write(message=line)
            return
        found = EXCEPTION.match(line)
        if found is not None:
            self._write(error=found.group(1)[:100])

    def _write(self, **fields: str) -> None:
        now = self._clock()
        if now - self._minute >= 60:
            self._tell_left_out()
            self._minute, self._lines = now, 0
        self._lines += 1
        if self._lines > MAX_LINES_A_MINUTE:
            self._left_out += 1
            return
        self._log("page", level="warning", **fields)

    def _tell_left_out(self) -> None:
        if self._left_out:
            self._log("page", level="warning", left_out=self._left_out)
        self._left_out = 0
