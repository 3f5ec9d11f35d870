"""The page's parts without a browser: how texts are shown, what is made of an API's stream, the end of an answer."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("gradio")
pytest.importorskip("httpx")

from arriero.serving.ui.answers import Answers
from arriero.serving.ui.client import AnswerError, ApiClient, Progress
from arriero.serving.ui.page import messages_of, shown, text_of
from arriero.serving.ui.script import plain, show

TEXTS = st.text(st.one_of(st.sampled_from("<&>;/!?`~ \t\n\\#ab:\ufdd0\ufdd1\ufdd2"), st.characters(codec="utf-8")))


@given(TEXTS)
@example("\ufdd2<b>&lt;\ufdd0")
@example("```html\n<b>\n")
@example("<https://example.org>")
def test_a_text_comes_back_as_it_was_and_shows_no_tag(text: str) -> None:
    seen = show(text)
    assert plain(seen) == text
    assert text_of(shown({"role": "user", "content": text})["content"]) == text
    assert not re.search(r"<(?!https?://)[A-Za-z/!?]|&#?[A-Za-z0-9]+;", seen)


def test_turns_of_one_role_are_one_message_and_a_thought_is_none() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a <b>"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "hm", "metadata": {"title": "Thought"}},
        {"role": "assistant", "content": "c"},
    ]
    made = [{"role": "user", "content": "a <b>\n\nb"}, {"role": "assistant", "content": "c"}]
    assert messages_of([shown(turn) for turn in turns], " ") == made
    assert messages_of([], "Be kind.") == [{"role": "system", "content": "Be kind."}]


class _Stub(http.server.BaseHTTPRequestHandler):
    body: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def client() -> Iterator[ApiClient]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield ApiClient(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def told(client: ApiClient, *events: Any, done: bool = True) -> tuple[str, str]:
    """The text of the last progress, and the word of an error."""
    lines = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
    _Stub.body = "".join(f"data: {line}\r\n\r\n" for line in [*lines, *(["[DONE]"] if done else [])]).encode()

    async def ask() -> tuple[str, str]:
        text = ""
        try:
            async for progress in client.chat("", [], {}):
                text = progress.text
        except AnswerError as error:
            return text, f"{error.word}: {error.detail}"
        return text, ""

    return asyncio.run(ask())


def piece(text: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def test_other_line_separators_are_part_of_a_text(client: ApiClient) -> None:
    assert told(client, piece("a\u2028b\u2029c\u0085d")) == ("a\u2028b\u2029c\u0085d", "")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [],
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{"delta": None}]},
        piece(None),
        {**piece(""), "error": None},
        {"choices": [], "usage": {}},
    ],
    ids=str,
)
def test_a_chunk_with_nothing_is_passed_over(client: ApiClient, odd: Any) -> None:
    assert told(client, piece("a"), odd, {**piece("b"), "error": None}) == ("ab", "")


def test_what_goes_wrong_in_a_stream_is_said(client: ApiClient) -> None:
    assert told(client, piece("a"), "{oh") == ("a", "failed: the server's answer is not JSON")
    assert told(client, {"error": {"message": "too hot"}}) == ("", "failed: too hot")
    assert told(client, {"error": "too hot"}) == ("", "failed: too hot")
    assert told(client, piece("a"), done=False) == ("a", "broken_off: ")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": 3}', b'{"data": [{}]}'])
def test_an_unreadable_list_of_models_is_said(client: ApiClient, body: bytes) -> None:
    _Stub.body = body
    with pytest.raises(AnswerError, match="not readable"):
        asyncio.run(client.models(""))


async def _counting(closed: list[str], name: str) -> AsyncGenerator[Progress]:
    try:
        yield Progress("one", "", 1, 0.0)
        await asyncio.sleep(60)
    finally:
        closed.append(name)


def test_an_answer_ends_when_asked_or_when_its_page_asks_again() -> None:
    async def run() -> None:
        answers, closed = Answers(), list[str]()
        first = answers.until_ended("page", _counting(closed, "first"))
        other = answers.until_ended("other", _counting(closed, "other"))
        assert (await anext(first)).text == (await anext(other)).text == "one"
        waiting = asyncio.ensure_future(anext(first, None))
        await asyncio.sleep(0.01)
        second = answers.until_ended("page", _counting(closed, "second"))
        assert (await anext(second)).text == "one"
        assert await waiting is None
        assert closed == ["first"]
        answers.end("page")
        answers.end("nobody")
        assert await anext(second, None) is None
        assert closed == ["first", "second"]
        answers.end("other")
        assert await anext(other, None) is None

    asyncio.run(run())
