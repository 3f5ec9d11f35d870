"""The process that listens: sockets, signals, and an end in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from arriero.errors import ArrieroError, ConfigError
from arriero.serving.doors import DISCARD_BYTES, DISCARD_SECONDS
from arriero.serving.request_log import JsonLog, LogHandler
from arriero.serving.service import Service

HEADER_SECONDS = 20.0  # for a request's head to arrive
MAX_HEAD_BYTES = 32 * 1024  # beyond it nothing is even parsed; `Doors` has the finer limits
KEEP_ALIVE_SECONDS = 15
BACKLOG = 512
SPARE_CONNECTIONS = 256  # above `--max_connections`, for probes and for refusals that say why


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which does not wait for ever for a request to begin, nor for the rest of one that was answered."""

    _waiting: asyncio.TimerHandle | None = None
    _seconds: float | None = None
    _left_over = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, "connections": self.connections}  # requests can see how many there are
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._left_over = self._left_over + len(data) if self._is_answered else 0
        super().data_received(data)
        self._watch()
        if self._left_over > DISCARD_BYTES and self._is_answered:
            self._give_up()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answered:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def _is_answered(self) -> bool:
        """Whether a body still comes whose request has its answer."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
        """Run the clock while a head is incomplete, or what is left of a body is thrown away."""
        seconds = HEADER_SECONDS if self.conn.their_state is h11.IDLE else None
        seconds = DISCARD_SECONDS if self._is_answered else seconds
        if seconds == self._seconds:
            return
        self._stop()
        self._seconds = seconds
        if seconds is not None:
            self._waiting = self.loop.call_later(seconds, self._give_up)

    def _stop(self) -> None:
        self._seconds = None
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._stop()
        if not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket for an address, not listening yet: a port that is taken is found before a model is loaded.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # With the protocol: asyncio sets TCP_NODELAY on connections that say TCP. Without it what follows a first small part
        # of an answer waits for the client's acknowledgement, 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): free it, or choose others by --host and "
            f"{option}"
        ) from error
    listener.setblocking(False)
    return listener


def tls_files(certfile: str | None, keyfile: str | None) -> dict[str, Any]:
    """uvicorn's settings for https; none for http.

    Raises:
        ConfigError: files that are no certificate with its key.
    """
    if certfile is None:
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty pass phrase: one that is asked for on a terminal would stop a service.
        context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ssl.SSLError) as error:
        key = f"--ssl_keyfile {keyfile}" if keyfile is not None else "no --ssl_keyfile"
        raise ConfigError(
            f"--ssl_certfile {certfile} and {key} cannot be used ({error.strerror or error}): give a PEM certificate chain "
            "and its private key without a pass phrase"
        ) from error
    return {"ssl_certfile": certfile, "ssl_keyfile": keyfile}


class Server(uvicorn.Server):
    """Serves until it is told to end: then readiness turns false, running requests have their time, and what is left is
    cancelled. A second signal ends it at once.

    Attributes:
        failure: why it ended by itself.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_seconds: float, listening: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._listening = service, drain_seconds, listening
        self._draining: asyncio.Task[None] | None = None
        self._signal: str | None = None
        self.failure: ArrieroError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. It may have come in the middle of anything, so only flags are set here."""
        if self._service.admission.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.admission.draining = True
        self._signal = signal.Signals(sig).name

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        failure = self._service.background.failure
        if failure is not None and self.failure is None:
            self.failure = failure
            self.should_exit = True
        if self._service.admission.draining and self._draining is None:
            self._service.log("shutdown", signal=self._signal, active=self._service.admission.active)
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        service = self._service
        try:
            await asyncio.wait_for(service.admission.idle(), self._drain_seconds)
        except TimeoutError:
            service.log("drain_timeout", level="warning", cancelled=service.admission.active)
        # Those that are left hear of it: their iteration ends with what they have come to.
        await asyncio.get_running_loop().run_in_executor(None, service.background.close)
        self.should_exit = True


async def serve(
    app: FastAPI,
    service: Service,
    listener: socket.socket,
    *,
    drain_seconds: float,
    max_connections: int,
    tls: dict[str, Any],
    listening: Callable[[], None],
) -> None:
    """Answer requests until a signal comes.

    Args:
        listener: bound.
        tls: of `tls_files`.
        listening: called when connections are taken.

    Raises:
        ArrieroError: the engine cannot go on.
    """
    _pass_on(service.log)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=max_connections + SPARE_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        backlog=BACKLOG,
        **tls,
    )
    server = Server(config, service, drain_seconds, listening)
    await server.serve(sockets=[listener])
    if server.failure is not None:
        raise server.failure


def _pass_on(log: JsonLog) -> None:
    """Let the messages of libraries be lines of the log too."""
    handler = LogHandler(log)
    for name in ("uvicorn", "asyncio", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
