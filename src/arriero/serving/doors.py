"""What stands before every route: sizes, the host that is addressed, the page that asks, the key, the rate."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Collection, Container

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.serving.access import Client, Keys, RateLimit
from arriero.serving.api_errors import ApiError
from arriero.serving.json_response import error_response

MAX_TARGET_BYTES = 4096  # path and query
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
BODY_SECONDS = 60.0  # for a whole body to arrive
DISCARD_BYTES, DISCARD_SECONDS = 16 * 2**20, 5.0
OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping", "/version")
READING = ("GET", "HEAD", "OPTIONS")  # methods that make no work
RATE_HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
RETRY_CONNECTIONS = 5  # seconds
_PORTS = {"http": ":80", "https": ":443"}


class Doors:
    """ASGI middleware that refuses before anything is read. It denies by default: only `OPEN_PATHS` need no key."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        rate: RateLimit,
        max_body_bytes: int,
        hosts: Container[str] | None,
        origins: Collection[str] = (),
        body_seconds: float = BODY_SECONDS,
        max_connections: int | None = None,
    ) -> None:
        """
        Args:
            hosts: names that requests may be addressed to; None: any. A web page whose own name was made to point to this
                machine (DNS rebinding) addresses another one.
            origins: of web pages that may ask for work, besides this server's own.
            body_seconds: for a whole body to arrive.
            max_connections: with more of them only `OPEN_PATHS` are answered; None: any number.
        """
        self._app, self._keys, self._rate, self._max_body_bytes, self._hosts = app, keys, rate, max_body_bytes, hosts
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self._body_seconds, self._max_connections = body_seconds, max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # web sockets
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        body = _Body(scope, receive, self._max_body_bytes, self._body_seconds)
        try:
            self._check_connections(scope)
            self._check_sizes(scope)
            self._check_host(scope)
            self._check_origin(scope)
            state = scope.setdefault("state", {})
            state["client"] = self._client(scope)
            state["rate"] = self._check_rate(scope, state["client"])
        except ApiError as error:
            body.refused = error.status in (400, 413, 414, 431, 503)
            await error_response(error)(scope, receive, body.closing(send))
            return
        await self._app(scope, body.receive, body.closing(send))

    def _check_connections(self, scope: Scope) -> None:
        """Of those above the limit probes alone are answered: whoever watches the server must not take it for dead."""
        connections = len(scope.get("state", {}).get("connections", ()))
        if self._max_connections is None or connections <= self._max_connections or scope["path"] in OPEN_PATHS:
            return
        raise ApiError(
            503,
            f"there are more than {self._max_connections} connections: try again later",
            code="too_many_connections",
            retry_after=RETRY_CONNECTIONS,
        )

    def _check_sizes(self, scope: Scope) -> None:
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        if target > MAX_TARGET_BYTES:
            raise ApiError(414, f"the address of the request is longer than {MAX_TARGET_BYTES} bytes")
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers are more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes")
        lengths = [value for name, value in headers if name == b"content-length"]
        if lengths and any(
            name == b"transfer-encoding" for name, _ in headers
        ):  # RFC 9112, 6.1: smuggled, or a mistake
            raise ApiError(400, "send Content-Length or Transfer-Encoding, not both", code="ambiguous_length")
        if lengths and (not lengths[0].isdigit() or int(lengths[0][:20]) > self._max_body_bytes):
            raise too_large(self._max_body_bytes)

    def _check_host(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        host = Request(scope).headers.get("host", "")
        if not host and scope["path"] in OPEN_PATHS:  # probes speak HTTP/1.0
            return
        name = host[1 : host.find("]")] if host.startswith("[") else host.rsplit(":", 1)[0] if ":" in host else host
        if name.lower() not in self._hosts:
            raise ApiError(
                421,
                f"this server is not called {name[:100]!r}: address it as localhost or by its IP address, or start it with "
                "--allowed_hosts and this name",
                code="unknown_host",
            )

    def _check_origin(self, scope: Scope) -> None:
        """A browser says which page asks, others say nothing. What only reads needs no refusal: no answer reaches a foreign
        page."""
        headers = Request(scope).headers
        origin = headers.get("origin")
        if origin is None or scope["method"] in READING or origin.lower() in self._origins:
            return
        scheme, _, page = origin.lower().partition("://")
        default = _PORTS.get(scheme, "")
        if page and page.removesuffix(default) == headers.get("host", "").lower().removesuffix(default):
            return
        raise ApiError(
            403,
            f"pages of {origin[:100]!r} may not use this server unless --cors_origins names them",
            code="origin_not_allowed",
        )

    def _client(self, scope: Scope) -> Client:
        address = scope["client"][0] if scope.get("client") else "unknown"
        if not self._keys or scope["path"] in OPEN_PATHS:
            return Client(address)
        words = Request(scope).headers.get("authorization", "").split()
        given = words[1] if len(words) == 2 and words[0].lower() == "bearer" else None
        if given is None:
            raise ApiError(401, "send an API key: Authorization: Bearer KEY", code="missing_api_key")
        client = self._keys.find(given)
        if client is None:
            raise ApiError(401, "the API key is not one of this server's", code="invalid_api_key")
        return client

    def _check_rate(self, scope: Scope, client: Client) -> dict[str, str]:
        """The headers that tell of the rate; none where it does not count: only what is posted makes work."""
        if self._rate.per_minute == 0 or scope["method"] != "POST":
            return {}
        left, wait = self._rate.take(client.name)
        if wait > 0:
            raise ApiError(
                429,
                f"more than {self._rate.per_minute} requests a minute: try again in {wait:.1f} s",
                code="rate_limit_exceeded",
                retry_after=max(1, math.ceil(wait)),
            )
        return dict(zip(RATE_HEADERS, (str(self._rate.per_minute), str(left)), strict=True))


class _Body:
    """Counts what arrives, and waits no longer for all of it than it should.

    Attributes:
        refused: whether the connection ends with the answer, since what is left of the body cannot be told from what follows.
    """

    def __init__(self, scope: Scope, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._expected = any(name == b"expect" for name, _ in scope["headers"])  # it comes when it is asked for
        self._size, self._whole, self._deadline = 0, False, 0.0
        self.refused = False

    async def receive(self) -> Message:
        if self._whole:  # what comes next is that the client leaves
            return await self._receive()
        self._deadline = self._deadline or asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            self.refused = True
            raise ApiError(408, f"the body of the request did not arrive within {self._seconds:g} s") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                self.refused = True
                raise too_large(self._limit)
        return message

    def closing(self, send: Send) -> Send:
        """`send` that ends the connection where the body is refused: the answer goes out at once, the end of it when the
        client has had time to read why. One whose connection is closed while it writes never reads it."""
        discards = False

        async def sending(message: Message) -> None:
            nonlocal discards
            unasked = self._expected and not self._deadline
            if message["type"] == "http.response.start" and (self.refused or unasked):
                MutableHeaders(scope=message)["connection"] = "close"
                discards = not unasked
            if discards and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._discard()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        return sending

    async def _discard(self) -> None:
        size, more = 0, not self._whole
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while more and size < DISCARD_BYTES:
                    message = await self._receive()
                    size += len(message.get("body", b""))
                    more = message["type"] == "http.request" and message.get("more_body", False)


def too_large(limit: int) -> ApiError:
    """The refusal of a body."""
    return ApiError(413, f"the body of the request is larger than {limit} bytes", code="body_too_large")
