"""One request over HTTP/1.1, and its answer as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import h11

from arriero import __version__

READ_BYTES = 65536
MAX_HEAD_BYTES = 65536


class Endpoint:
    """A server's address, and how to speak to it. Each request has a connection of its own, as each new client has."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """
        Args:
            base_url: with the API's `/v1`, without a slash at its end.
        """
        address = urlsplit(base_url)
        secure = address.scheme == "https"
        self.base_url = base_url
        self._host, self._port = str(address.hostname), address.port or (443 if secure else 80)
        self._path = address.path
        self._tls = ssl.create_default_context() if secure else None
        self._headers = [
            ("Host", address.netloc),
            ("User-Agent", f"arriero/{__version__}"),
            ("Accept", "*/*"),
            ("Connection", "close"),
        ]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """The status of the answer, and its body in the parts that arrive.

        Args:
            path: below the base.

        Raises:
            OSError: no connection, or one that broke.
            h11.RemoteProtocolError: the answer is no HTTP, or ends too early.
        """
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            own = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
            head = [*self._headers, *(headers or {}).items()]
            if body:
                head += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            sent = own.send(h11.Request(method=method, target=self._path + path, headers=head)) or b""
            sent += (own.send(h11.Data(data=body)) or b"") if body else b""
            writer.write(sent + (own.send(h11.EndOfMessage()) or b""))
            await writer.drain()
            event = await _next(own, reader)
            while isinstance(event, h11.InformationalResponse):
                event = await _next(own, reader)
            if not isinstance(event, h11.Response):
                raise h11.RemoteProtocolError("the server closed the connection without an answer")
            yield event.status_code, _parts(own, reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()


async def _parts(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(connection, reader), h11.Data):
        yield bytes(event.data)


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(READ_BYTES))
    return event


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events as they are complete; comments and other fields are left out."""
    rest, data = b"", []
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
