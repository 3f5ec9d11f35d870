"""The parts of the server that need no process: JSON with limits, rates, places, what leaves of a failure."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from arriero.engine.sampling_params import MAX_LOGPROB_VALUES, SamplingParams
from arriero.errors import ConfigError
from arriero.serving.access import Keys, RateLimit
from arriero.serving.admission import MAX_TEXTS, Admission
from arriero.serving.api_errors import ApiError
from arriero.serving.body import check
from arriero.serving.exchange import Exchange
from arriero.serving.openai.chat import prepare as prepare_chat
from arriero.serving.openai.completions import prepare as prepare_completion
from arriero.serving.openai.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from arriero.serving.request_log import JsonLog
from arriero.serving.server import bind
from arriero.serving.service import Limits, Service
from arriero.serving.strict_json import MAX_DEPTH, parse_object
from arriero.serving.text_bound import TextBound

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


def test_texts_take_no_places_of_answers() -> None:
    async def run() -> None:
        admission = Admission(2, 1)
        answers, large = admission.enter(3), admission.enter_texts(MAX_TEXTS - 1)
        small = admission.enter_texts(1)
        with pytest.raises(ApiError, match="8192 texts of 2 requests") as full:
            admission.enter_texts(1)
        assert (full.value.status, full.value.code, full.value.retry_after) == (429, "queue_full", 5)
        large.leave()
        large.leave()
        others = [admission.enter_texts(1) for _ in range(2)]
        with pytest.raises(ApiError, match="3 texts of 3 requests"):
            admission.enter_texts(1)
        assert admission.active == 6
        for place in (small, answers, *others):
            assert not admission._idle.is_set()
            place.leave()
        await asyncio.wait_for(admission.idle(), 1)
        admission.draining = True
        with pytest.raises(ApiError) as late:
            admission.enter_texts(1)
        assert (late.value.status, late.value.code) == (503, "shutting_down")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x"] * 3000, "it has 3000 texts: at most 2048 are taken"),
        ([[1]] * 2049, "it has 2049 texts: at most 2048 are taken"),
        ([1] * 300_001, "input has 300001 tokens: at most 300000 are taken in one request"),
        ([], "it is empty: give a text, token ids, or a list of texts"),
        ([[1], []], r"input[1] is empty: give at least one token"),
        (["x", [1]], r"input[1] is of another kind than input[0]"),
        (["x", 1], r"input[1] is of another kind than input[0]"),
        ([None], r"input[0] is of another kind"),
        ([True], r"input[0] is of another kind"),
        ([1, 2, "x"], r"input[2] is no token id"),
        ([[1, True]], r"input[0][1] is no token id"),
        ([1, -1], r"input[1] is no token id"),
        ([2**40], r"input[0] is no token id"),
        (5, "it must be a text, token ids, or a list of texts"),
        ({"{fault}": 1}, "it must be a text"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_wrong_with_texts_is_said(given: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check(parse_object, json.dumps({"input": given}).encode(), EmbeddingRequest)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "input", "invalid_value")
    assert caught.value.message.startswith(f"Invalid 'input': {message}")


@pytest.mark.parametrize(
    "given", ["x", [1, 2], ["x"] * 2048, [[1]] * 2048, [0], ["", "{x}"]], ids=lambda v: repr(v)[:20]
)
def test_texts_are_taken_in_every_form(given: Any) -> None:
    assert check(parse_object, json.dumps({"input": given}).encode(), EmbeddingRequest).input == given


class _Long:
    """Stands in for a service with a model of a long context and one token a character."""

    limits = Limits(131072, 131072, 131072, 60.0)
    room, check_length = Service.room, Service.check_length

    def __init__(self) -> None:
        self.reasoning = True
        self.background = SimpleNamespace(engine=SimpleNamespace(runner=SimpleNamespace(vocab_size=2048)))
        self.text_bound = TextBound(None, False)
        self.tokenizer = SimpleNamespace(
            chat_template="",
            tool_template="",
            has_chat_template=lambda: True,
            chat=lambda messages, **_: [1] * len(messages[0]["content"]),
        )
        self.tokenizer.encode = lambda text, **_: [1] * len(text)


LOGPROBS = {"logprobs": True, "top_logprobs": 20}


def prepared(body: dict[str, Any]) -> SamplingParams:
    service: Any = _Long()
    if "messages" in body:
        return prepare_chat(service, check(parse_object, json.dumps(body).encode(), ChatRequest)).params
    return prepare_completion(service, check(parse_object, json.dumps(body).encode(), CompletionRequest))[1]


def test_an_answer_without_a_length_is_as_long_as_its_log_probabilities_may_be() -> None:
    hello = [{"role": "user", "content": "Hello"}]
    for asked, longest in (
        ({}, 131067),
        ({"logprobs": True}, 131067),
        (LOGPROBS, MAX_LOGPROB_VALUES // 21),
        ({**LOGPROBS, "n": 128, "min_tokens": 5000}, MAX_LOGPROB_VALUES // 21 // 128),
    ):
        params = prepared({"messages": hello, **asked})
        assert params.max_new_tokens == longest
        assert params.logprob_values(5) <= MAX_LOGPROB_VALUES
        params.check_prompt(5)
    # a prompt whose own take nearly all
    params = prepared({"prompt": "x" * 99860, "logprobs": 20, "echo": True})
    assert params.max_new_tokens == 4
    params.check_prompt(99860)
    assert prepared({"prompt": "x", "logprobs": 20}).max_new_tokens == 16


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (
            {"max_tokens": 120_000},
            "max_tokens",
            "'max_tokens' is 120000: with 'top_logprobs' 20 that is up to 2520000 ",
        ),
        (
            {"max_completion_tokens": 50_000, "n": 2},
            "max_completion_tokens",
            "up to 2100000 .* in 2 answers .'n'., and at",
        ),
        ({"max_tokens": 100_000, "top_logprobs": 0, "n": 40}, "max_tokens", "with 'logprobs' that is up to 4000000 "),
    ],
)
def test_a_length_that_is_too_much_is_named_in_chats(asked: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        prepared({"messages": [{"role": "user", "content": "Hello"}], **LOGPROBS, **asked})
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"max_tokens": 120_000},
            "^'logprobs' is 20 and 'max_tokens' 120000: up to 2520000 log-probabilities for a prompt, ",
        ),
        ({"max_tokens": 60_000, "n": 2}, "and 'max_tokens' 60000, with 'n' 2: up to"),
        ({"max_tokens": 60_000, "best_of": 2}, "with 'best_of' 2: up to"),
        (
            {"prompt": "x" * 120_000, "echo": True},
            "^'logprobs' is 20, with 'echo' and a prompt of 120000 tokens: up to",
        ),
    ],
)
def test_log_probabilities_that_are_too_many_are_named_in_completions(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        prepared({"prompt": "Hello", "logprobs": 20, **asked})
    assert (caught.value.status, caught.value.param) == (400, "max_tokens" if "max_tokens" in asked else "logprobs")
    assert "prompt_logprobs" not in caught.value.message


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
