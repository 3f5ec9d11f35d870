"""The names under which a server answers, and what of the page's errors is written down."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import Container
from types import SimpleNamespace
from typing import Any

import httpx
import pydantic
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from arriero.serving.access import Keys, RateLimit
from arriero.serving.doors import Doors
from arriero.serving.host_names import hosts_for
from arriero.serving.page_log import MAX_LINES_A_MINUTE, PageLog
from arriero.serving.page_process import PageProcess
from arriero.serving.request_log import JsonLog

KEY = "k" * 24


def status(host: str, hosts: Container[str] | None, **headers: str) -> int:
    """What a POST addressed to a host hears."""

    async def answer(request: Any) -> PlainTextResponse:
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])
    doors = Doors(app, keys=Keys({}), rate=RateLimit(0), max_body_bytes=1000, hosts=hosts)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(doors), base_url="http://x") as client:
            return await client.post("/v1/completions", headers={"host": host, **headers}, content=b"")

    found = asyncio.run(ask())
    if found.status_code == 421:
        assert "--allowed_hosts" in found.json()["error"]["message"]
    return found.status_code


STRANGE = ["evil.example", "evil.example:8011", "localhost.evil.example", "127.0.0.1.nip.io", "local.evil", "a:b:c", ""]


@pytest.mark.parametrize("listens", ["0.0.0.0", "::", "192.168.1.7"])
def test_without_keys_a_web_pages_own_name_reaches_nothing(listens: str) -> None:
    """DNS rebinding: the page and the server it asks are one origin to the browser, so that no other check helps."""
    hosts = hosts_for(listens, [], keys=False)
    for host in STRANGE:
        assert status(host, hosts, origin=f"http://{host}") == 421, host
    own = ["localhost:8011", "127.0.0.1:8011", "192.168.1.7", "[::1]:8011", "[fd00::7]", socket.gethostname()]
    for host in [*own, "arriero:8011", "ARRIERO", "arriero.default.svc.cluster.local", "box.local.", "app.localhost"]:
        assert status(host, hosts, origin=f"http://{host}") == 200, host
    named = hosts_for(listens, ["Chat.Example.org"], keys=False)
    assert status("chat.example.org:443", named) == 200
    assert status("other.example.org", named) == 421


def test_where_keys_are_asked_for_any_name_will_do() -> None:
    assert hosts_for("0.0.0.0", [], keys=True) is None
    named = hosts_for("0.0.0.0", ["chat.example.org"], keys=True)
    assert (status("chat.example.org", named), status("evil.example", named)) == (200, 421)


def test_the_host_name_with_its_domain_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.Corp.Example")
    hosts = hosts_for("0.0.0.0", [], keys=False)
    assert (status("box.corp.example", hosts), status("other.corp.example", hosts)) == (200, 421)


def test_on_this_machine_alone_other_machines_names_are_none_of_its_own() -> None:
    for keys in (True, False):
        hosts = hosts_for("127.0.0.1", ["chat.example.org"], keys=keys)
        for host in (*STRANGE, "arriero", "192.168.1.7"):
            assert status(host, hosts) == 421
        assert status("chat.example.org", hosts) == status("localhost", hosts) == 200


class Typed(pydantic.BaseModel):
    """What a page sends."""

    data: list[int]


def of_a_page(data: list[str]) -> bytes:
    """What its process says of a request, as Python writes a failure."""
    import traceback

    try:
        Typed.model_validate({"data": data})
    except pydantic.ValidationError as error:
        return b"ERROR:    Exception in ASGI application\n" + "".join(traceback.format_exception(error)).encode()
    raise AssertionError


def told(*pieces: bytes, clock: Any = lambda: 0.0) -> list[dict[str, Any]]:
    """The lines of the log."""
    stream = io.StringIO()
    log = PageLog(JsonLog(stream), clock)
    for piece in pieces:
        log.push(piece)
    log.finish()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_of_what_is_typed_into_a_page_nothing_is_written_down() -> None:
    said = of_a_page(["my secret words"] * 5000)
    assert len(said) > 500_000
    assert b"my secret words" in said
    for pieces in ([said], [said[i : i + 997] for i in range(0, len(said), 997)]):
        (line,) = told(*pieces)
        assert (line["event"], line["error"]) == ("page", "pydantic_core._pydantic_core.ValidationError")
        assert "secret" not in json.dumps(line)


def test_errors_of_the_page_itself_are_told_and_not_too_many() -> None:
    taken = b"arriero: cannot serve the page on 127.0.0.1 port 80 (taken): choose another --ui_port\n"
    (line,) = told(taken[:30], taken[30:])
    assert line["message"] == taken.decode().strip()
    assert told(b"a plain line\n", b"x" * 10**6, b"\n") == []
    assert [line["error"] for line in told(b"Traceback:\n  File\nKeyError: 'typed'\nKeyboardInterrupt")] == [
        "KeyError",
        "KeyboardInterrupt",
    ]
    now = [0.0]
    stream = io.StringIO()
    log = PageLog(JsonLog(stream), lambda: now[0])
    log.push(b"ValueError: typed\n" * 1000)
    assert len(stream.getvalue().splitlines()) == MAX_LINES_A_MINUTE
    now[0] = 61.0
    log.push(b"ValueError: typed\n")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("left_out") for line in lines[-2:]] == [1000 - MAX_LINES_A_MINUTE, None]
    assert len(lines) == MAX_LINES_A_MINUTE + 2


def test_the_pages_process_is_read_that_way() -> None:
    stream = io.StringIO()

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(of_a_page(["my secret words"] * 5000))
        reader.feed_eof()

        async def ended() -> int:
            return 3

        process: Any = SimpleNamespace(stderr=reader, wait=ended)
        page: Any = SimpleNamespace(_log=JsonLog(stream), _closing=False)
        await PageProcess._read(page, process)

    asyncio.run(run())
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line.get("code")) for line in lines] == [("page", None), ("page_ended", 3)]
    assert "secret" not in stream.getvalue()
