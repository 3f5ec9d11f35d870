"""The outermost layer: each request gets an id, a line in the log, and never more of an error than it may know."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.serving.api_errors import ApiError
from arriero.serving.json_response import error_response
from arriero.serving.metrics import Metrics
from arriero.serving.request_log import JsonLog
from arriero.serving.tracing import NoTracing, Tracing

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds: no line in the log if all is well.
_QUIET = ("/health", "/health/live", "/health/ready", "/ping", "/metrics")


class Exchange:
    """ASGI middleware. Routes put what they know of a request into `request.state.facts`, which is logged."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        log: JsonLog,
        metrics: Metrics,
        routes: Callable[[str], str],
        tracing: Tracing | None = None,
    ) -> None:
        """
        Args:
            routes: the name under which a path is counted; there must be few of them.
        """
        self._app, self._log, self._metrics, self._routes = app, log, metrics, routes
        self._tracing = tracing or NoTracing()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Request(scope).headers.get("x-request-id", "")
        request_id = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["facts"], state["began"] = request_id, {}, time.perf_counter()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
                for name, value in state.get("rate", {}).items():
                    headers[name] = value
            await send(message)

        failed = False
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, sending)
            except Exception as error:
                failed = True
                self._log.failure(error, request_id=request_id)
                if status:
                    raise  # the answer has begun: only the connection's end can tell
                hidden = ApiError(
                    500, f"internal error; the server's log says what, under {request_id}", code="internal_error"
                )
                await error_response(hidden)(scope, receive, sending)
            finally:
                self._count(scope, status, failed)

    def _count(self, scope: Scope, status: int, failed: bool) -> None:
        state = scope["state"]
        seconds = time.perf_counter() - state["began"]
        path, facts = scope["path"], state["facts"]
        route = self._routes(path)
        told = "500" if failed else str(status or 499)  # 499: the client left before there was an answer
        self._metrics.requests.labels(route, told).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if told >= "400":
            self._metrics.errors.labels(told).inc()
        if path in _QUIET and told < "400":
            return
        known = {"request_id": state["request_id"], **facts}
        self._tracing.record(scope["method"], route, int(told), state["began"], known, Request(scope).headers)
        client = state.get("client")
        self._log(
            "request",
            level="error" if told >= "500" and told != "503" else "info",  # 503: it says no, and all is well
            request_id=state["request_id"],
            method=scope["method"],
            path=path[:200],
            status=int(told),
            seconds=round(seconds, 4),
            client=client.name if client is not None else None,
            **facts,
        )
