"""What stands before every route: sizes, the host that is addressed, the key, the rate."""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Collection

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.serving.access import Client, Keys, RateLimit
from arriero.serving.api_errors import ApiError
from arriero.serving.json_response import error_response

MAX_TARGET_BYTES = 4096  # path and query
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
BODY_SECONDS = 60.0  # for a body to arrive
DISCARD_BYTES, DISCARD_SECONDS = 16 * 2**20, 5.0
OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping", "/version")


class Doors:
    """ASGI middleware that refuses before anything is read. It denies by default: only `OPEN_PATHS` need no key."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        rate: RateLimit,
        max_body_bytes: int,
        hosts: Collection[str] | None,
    ) -> None:
        """
        Args:
            hosts: names that requests may be addressed to; None: any. A web page whose own name was made to point to this
                machine (DNS rebinding) addresses another one.
        """
        self._app, self._keys, self._rate, self._max_body_bytes, self._hosts = app, keys, rate, max_body_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # web sockets
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        try:
            self._check_sizes(scope)
            self._check_host(scope)
            state = scope.setdefault("state", {})
            state["client"] = self._client(scope)
            state["rate"] = self._check_rate(scope, state["client"])
        except ApiError as error:
            too_much = error.status in (413, 414, 431)
            if too_much:
                await _discard(receive)
            await error_response(error, {"connection": "close"} if too_much else {})(scope, receive, send)
            return
        await self._app(scope, _Body(receive, self._max_body_bytes).receive, send)

    def _check_sizes(self, scope: Scope) -> None:
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        if target > MAX_TARGET_BYTES:
            raise ApiError(414, f"the address of the request is longer than {MAX_TARGET_BYTES} bytes")
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers are more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes")
        lengths = [value for name, value in headers if name == b"content-length"]
        if lengths and (not lengths[0].isdigit() or int(lengths[0][:20]) > self._max_body_bytes):
            raise too_large(self._max_body_bytes)

    def _check_host(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        host = Request(scope).headers.get("host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.rsplit(":", 1)[0] if ":" in host else host
        if name.lower() not in self._hosts:
            raise ApiError(
                421,
                f"this server is not called {name[:100]!r}: address it as localhost, or start it with --allowed_hosts",
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
        return {
            "x-ratelimit-limit-requests": str(self._rate.per_minute),
            "x-ratelimit-remaining-requests": str(left),
        }


class _Body:
    """Counts what arrives, and does not wait for it for ever."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._size, self._whole = receive, limit, 0, False

    async def receive(self) -> Message:
        if self._whole:  # what comes next is that the client leaves
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
        except TimeoutError as error:
            raise ApiError(408, f"the body of the request did not arrive within {BODY_SECONDS:g} s") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise too_large(self._limit)
        return message


async def _discard(receive: Receive) -> None:
    """Let a client finish that sends somewhat too much: one whose connection is closed while it writes never reads why."""
    size, more = 0, True
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and size < DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        return


def too_large(limit: int) -> ApiError:
    """The refusal of a body."""
    return ApiError(413, f"the body of the request is larger than {limit} bytes", code="body_too_large")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_for(host: str, more: Collection[str]) -> frozenset[str] | None:
    """The names for `Doors`: where every machine can come, any."""
    if not is_loopback(host):
        return frozenset(name.lower() for name in more) or None
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)})
