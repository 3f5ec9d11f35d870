"""The server's log: one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

MAX_TRACE = 8000  # characters


class JsonLog:
    """Writes events as JSON lines, so that nothing in them can pose as another line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """Write an event; values that are None are left out."""
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = {"time": moment, "level": level, "event": event}
        line |= {name: value for name, value in fields.items() if value is not None}
        stream = self._stream or sys.stderr
        try:
            stream.write(json.dumps(line, default=str) + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # whoever read it is gone; answers are worth more than the log

    def failure(self, error: BaseException, **fields: Any) -> None:
        """Write a defect, with its traceback: it is for whoever runs the server, and for nobody else."""
        trace = "".join(traceback.format_exception(error))[-MAX_TRACE:]
        self("failure", level="error", error=type(error).__name__, trace=trace, **fields)


class LogHandler(logging.Handler):
    """Passes the messages of libraries (uvicorn, asyncio) on."""

    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["trace"] = "".join(traceback.format_exception(record.exc_info[1]))[-MAX_TRACE:]
        self._log("message", level=record.levelname.lower(), **fields)
