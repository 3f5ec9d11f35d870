"""The parts of the server that need no process: JSON with limits, rates, places, what leaves of a failure."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from arriero.errors import ConfigError
from arriero.serving.access import Keys, RateLimit
from arriero.serving.admission import Admission
from arriero.serving.api_errors import ApiError
from arriero.serving.exchange import Exchange
from arriero.serving.request_log import JsonLog
from arriero.serving.server import bind
from arriero.serving.strict_json import MAX_DEPTH, parse_object

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_json_is_read_as_pythons_reads_it(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert isinstance(parse_object(data), dict)


def test_depth_is_counted_exactly() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)

    assert parse_object(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 1000, 100_000):
        with pytest.raises(ApiError, match="deep"):
            parse_object(nested(depth))


def test_a_rate_is_a_bucket_that_fills_evenly() -> None:
    now = [0.0]
    rate = RateLimit(6, clock=lambda: now[0])
    assert [rate.take("a")[1] for _ in range(6)] == [0] * 6
    assert rate.take("a") == (0, pytest.approx(10))
    assert rate.take("b") == (5, 0)
    now[0] = 9.0
    assert rate.take("a")[1] == pytest.approx(1)
    now[0] = 10.0
    assert rate.take("a")[1] == 0
    assert rate.take("a")[1] > 0
    now[0] = 10_000.0
    assert [rate.take("a")[1] == 0 for _ in range(7)] == [True] * 6 + [False]


def test_keys() -> None:
    keys = Keys({"a": "x" * 16, "b": "y" * 16})
    assert keys
    assert not Keys({})
    found = keys.find("y" * 16)
    assert found is not None
    assert found.name == "b"
    assert found.salt != getattr(keys.find("x" * 16), "salt", b"")
    for wrong in ("", "x" * 15, "x" * 17, "X" * 16, "\ud800"):
        assert keys.find(wrong) is None
    for unusable in ("short", "x y" * 10, "é" * 20, "x" * 600, "x" * 16 + "\n"):
        with pytest.raises(ConfigError):
            Keys({"a": unusable})


def test_places_are_given_once_and_taken_back_once() -> None:
    async def run() -> None:
        admission = Admission(2, 1)
        first, second = admission.enter(1), admission.enter(2)
        with pytest.raises(ApiError) as full:
            admission.enter(1)
        assert (full.value.status, full.value.code) == (429, "queue_full")
        second.leave()
        second.leave()
        assert admission.active == 1
        with pytest.raises(ApiError) as never:
            admission.enter(4)
        assert never.value.status == 400
        admission.draining = True
        with pytest.raises(ApiError) as late:
            admission.enter(1)
        assert late.value.status == 503
        waiting = asyncio.ensure_future(admission.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        first.leave()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


class _Metrics:
    """Stands in for the numbers."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_no_traceback_leaves_the_server() -> None:
    """Flask's debugger, torchchat: what went wrong is for the log."""

    async def fails(request: Request) -> Response:
        raise RuntimeError("secret /home/path")

    async def fails_later(request: Request) -> Response:
        async def pieces() -> Any:
            yield b"begun"
            raise RuntimeError("secret /home/path")

        return StreamingResponse(pieces())

    async def works(request: Request) -> Response:
        return PlainTextResponse("fine")

    written = io.StringIO()
    app = Starlette(debug=False, routes=[Route("/a", fails), Route("/b", fails_later), Route("/c", works)])
    log = JsonLog(written)
    app.add_middleware(Exchange, log=log, metrics=_Metrics(), routes=lambda path: path)  # type: ignore[arg-type]

    async def run() -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/a", headers={"x-request-id": "r1"})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert "secret" not in answer.text
            assert "Traceback" not in answer.text
            later = await client.get("/b")
            assert "secret" not in later.text
            assert (await client.get("/c", headers={"x-request-id": "bad id\n"})).headers["x-request-id"] != "bad id\n"

    asyncio.run(run())
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    failures = [line for line in lines if line["event"] == "failure"]
    assert len(failures) == 2
    assert failures[0]["request_id"] == "r1"
    assert "secret" in failures[0]["trace"]
    assert [line["status"] for line in lines if line["event"] == "request"] == [500, 500, 200]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_small_parts_of_an_answer_are_sent_at_once(host: str) -> None:
    """Without TCP_NODELAY the second part waits for the acknowledgement of the first, which may take 40 ms."""

    async def found() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind(host, 0)
        async with await asyncio.start_server(taken, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            try:
                return await asyncio.wait_for(told, 10)
            finally:
                writer.close()

    assert asyncio.run(found()) == 1
