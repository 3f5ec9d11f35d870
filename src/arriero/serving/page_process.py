"""The web page beside the API: a process of its own, which asks the API like every other client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from arriero.config.serving import ServeOptions
from arriero.serving.page_log import PageLog
from arriero.serving.request_log import JsonLog

END_SECONDS = 5.0
MAX_READ = 64 * 1024  # bytes at once


class PageProcess:
    """Started and ended with the server. It gets no key: whoever is in front of the page types one."""

    def __init__(self, api: str, options: ServeOptions, log: JsonLog) -> None:
        """
        Args:
            api: the server's address.
            log: what it says is a line of the server's log.
        """
        self._log = log
        port = api.rpartition(":")[2]
        # An address of all interfaces is none to connect to.
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        host = everywhere.get(options.host)
        own = api if host is None else f"{api.partition('://')[0]}://{host}:{port}"
        self._arguments = [
            "--api",
            own,
            "--host",
            options.host,
            "--port",
            str(options.ui_port),
            "--parent",
            str(os.getpid()),
        ]
        if options.allowed_hosts:
            self._arguments += ["--allowed_hosts", *options.allowed_hosts]
        if options.ssl_certfile is not None:
            self._arguments += ["--ssl_certfile", options.ssl_certfile, "--api_certificate", options.ssl_certfile]
        if options.ssl_keyfile is not None:
            self._arguments += ["--ssl_keyfile", options.ssl_keyfile]
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        """Start it; it says itself when the page is there."""
        # Its environment holds no key of the API, which the page must not have.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_API")}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # not with the Python files of the current folder
            "-m",
            "arriero.serving.ui.process",
            *self._arguments,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which ends it
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Until it ends, which is no reason for the API to end too."""
        assert process.stderr is not None
        said = PageLog(self._log)
        while data := await process.stderr.read(MAX_READ):
            said.push(data)
        said.finish()
        code = await process.wait()
        if not self._closing:
            self._log("page_ended", level="error", code=code)

    async def close(self) -> None:
        """End it."""
        self._closing = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await self._reader
