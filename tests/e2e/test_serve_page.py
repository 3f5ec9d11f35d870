"""The web page in a real browser (Debian's chromium), against a real server with a key."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import SOURCE, Served

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed (apt-get install chromium)", allow_module_level=True)


KEY = "k" * 30
HOSTILE = (
    'Look: <img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> [x](javascript:window.hacked=3)\n\n'
    "![](http://127.0.0.1:API/leak)\n\n```python\nprint('<b>')\n```"
)
SCREENSHOTS = os.environ.get("ARRIERO_SCREENSHOTS")  # a folder, to look at them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(url).status_code == 200
            return
        except httpx.HTTPError:
            assert time.monotonic() < deadline, "the page did not come"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, Served]]:
    port = free_port()
    with Served("--served_model_name", "tiny", "--port", str(port), env={"ARRIERO_API_KEY": KEY}) as server:
        wait_for_page(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", server


def opened(
    browser: Any, url: str, width: int = 1000, height: int = 800, locale: str = "en-US"
) -> tuple[Page, list[str]]:
    """The page, and the addresses of other hosts that it asks."""
    context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
    page = context.new_page()
    others: list[str] = []
    page.on(
        "request",
        lambda request: others.append(request.url) if not request.url.startswith((url, "data:", "blob:")) else None,
    )
    page.goto(url)
    page.wait_for_selector("#message textarea")
    return page, others


def enter_key(page: Page, key: str = KEY) -> None:
    if not page.locator("#key input").is_visible():
        page.locator("#settings button").first.click()
    page.locator("#key input").fill(key)
    page.locator("#key input").press("Tab")


def send(page: Page, text: str) -> None:
    page.locator("#message textarea").fill(text)
    page.locator("#send").click()


def turns(page: Page, role: str) -> list[str]:
    texts = "selector => [...document.querySelectorAll(selector)].map(element => element.innerText.trim())"
    found: list[str] = page.evaluate(texts, f"#conversation .message.{role}")
    return found


def until(page: Page, condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, page.locator("body").inner_text()[:2000]
        page.wait_for_timeout(50)


def box(page: Page) -> str:
    return page.locator("#message textarea").input_value()


def status(page: Page) -> str:
    return page.locator("#status").inner_text()


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def set_longest(page: Page, tokens: int) -> None:
    field = page.locator("#max_tokens input[type=number]")
    field.fill(str(tokens))
    field.press("Tab")


def test_a_conversation(browser: Any, address: tuple[str, Served]) -> None:
    page, others = opened(browser, address[0])
    assert page.locator("#key input").count() == 1, (
        "made when the settings open, a key typed there can be emptied again"
    )
    assert not page.locator("#key input").is_visible()
    send(page, "Hello")
    until(page, lambda: "send an API key" in status(page))
    assert turns(page, "bot") == []
    until(page, lambda: box(page) == "Hello")
    enter_key(page, "a-wrong-key-that-is-long")
    send(page, "Hello again")
    until(page, lambda: "not one of this server's" in status(page))
    picture(page, "wrong-key")
    until(page, lambda: turns(page, "user") == [] and box(page) == "Hello again")
    enter_key(page)
    until(page, lambda: page.locator("#model input").input_value() == "tiny")
    set_longest(page, 12)
    page.locator("#settings button").first.click()
    send(page, "Hello")
    until(page, lambda: "12 tokens" in status(page) and "tokens/s" in status(page))
    [first] = turns(page, "bot")
    assert first
    assert turns(page, "user") == ["Hello"]
    picture(page, "conversation")
    page.locator("#regenerate").click()
    until(page, lambda: len(turns(page, "bot")) == 1 and turns(page, "bot")[0] not in ("", first))
    until(page, lambda: "12 tokens" in status(page))
    send(page, "And now?")
    until(page, lambda: len(turns(page, "bot")) == 2)
    page.locator("#roll_back").click()
    until(page, lambda: len(turns(page, "user")) == 1)
    assert box(page) == "And now?"
    page.locator("#clear").click()
    until(page, lambda: turns(page, "user") == [] == turns(page, "bot"))
    assert others == []


def test_stop_ends_the_answer_in_the_server_too(browser: Any, address: tuple[str, Served]) -> None:
    url, served = address
    page, _ = opened(browser, url)
    enter_key(page)
    set_longest(page, 2000)
    send(page, "Tell me everything")
    until(page, lambda: turns(page, "bot") and len(turns(page, "bot")[0]) > 20)
    page.locator("#stop").click()

    def metrics() -> str:
        return httpx.get(f"{served.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text

    until(page, lambda: "arriero_requests_running 0.0" in metrics())
    length = len(turns(page, "bot")[0])
    page.wait_for_timeout(300)
    assert len(turns(page, "bot")[0]) == length
    made = re.findall(r"^arriero_generated_tokens_total\{.*\} (\S+)$", metrics(), re.MULTILINE)
    assert 0 < sum(map(float, made)) < 2000


def test_a_phone_in_chinese(browser: Any, address: tuple[str, Served]) -> None:
    page, _ = opened(browser, address[0], 360, 740, "zh-CN")
    assert page.locator("#send").inner_text() == "发送"
    enter_key(page)
    set_longest(page, 10)
    page.locator("#settings button").first.click()
    send(page, "你好")
    until(page, lambda: "10 tokens" in status(page))
    picture(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("conversation", "message"):  # the narrow screen is for the text
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] <= 12
        assert box["width"] >= 336
    for name in ("send", "stop", "regenerate", "roll_back", "clear"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def hostile(api: int) -> str:
    return HOSTILE.replace("API", str(api))


class _Stub(http.server.BaseHTTPRequestHandler):
    """An API whose model does what the last message says."""

    asked: ClassVar[list[str]] = []
    told: ClassVar[list[dict[str, Any]]] = []  # the requests

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self._begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "evil"}]}).encode())

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        asked = self.told[-1]["messages"][-1]["content"]
        if "fail" in asked:
            self.send_error(500)
            return
        self._begin("text/event-stream")
        if "silence" in asked:
            time.sleep(2)
        text = hostile(self.server.server_address[1])
        parts = [f"{number} " for number in range(500)] if "count" in asked else [f"You say {asked}"]
        deltas = [{"content": part} for part in parts]
        if "Look" in asked or "there?" in asked:
            deltas = [{"reasoning_content": f"I am sly. {text}"}, {"content": text}]
        try:
            for delta in deltas:
                chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                time.sleep(0.02)
            if "break" not in asked:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:  # the page has ended it
            return

    def _begin(self, media: str) -> None:
        self.send_response(200)
        self.send_header("content-type", media)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def stub(port: int = 0) -> Iterator[int]:
    _Stub.asked.clear()
    _Stub.told.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Stub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def page_process(*arguments: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.DEVNULL)
    try:
        wait_for_page(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_what_the_model_writes_cannot_act_and_a_server_may_come_back(browser: Any) -> None:
    api = free_port()
    with page_process("arriero", "serve", "--api_url", f"http://127.0.0.1:{api}/v1") as url:
        page, _ = opened(browser, url)
        send(page, "Are you there?")
        until(page, lambda: "does not answer" in status(page) and box(page) == "Are you there?")
        with stub(api):
            page.locator("#send").click()
            until(page, lambda: any("Look:" in turn for turn in turns(page, "bot")))
            before = len(turns(page, "bot"))
            send(page, hostile(api))
            until(page, lambda: len(turns(page, "bot")) == 2 * before)
            page.wait_for_timeout(300)
            thought = page.get_by_text("Thought", exact=False).first
            assert thought.is_visible()
            thought.click()
            until(page, lambda: page.get_by_text("I am sly.").first.is_visible())
            page.wait_for_timeout(300)
            roles = [[message["role"] for message in told["messages"]] for told in _Stub.told]
            assert roles == [["user"], ["user", "assistant", "user"]]
            assert "sly" not in json.dumps(_Stub.told)
            assert page.evaluate("window.hacked") is None
            inside = "#conversation .message"
            assert page.locator(f"{inside} script").count() == 0
            assert page.locator(f"{inside} [onerror]").count() == 0
            assert page.locator(f'{inside} a[href^="javascript"]').count() == 0
            assert page.locator(f"{inside} pre code").first.inner_text().strip() == "print('<b>')"
            picture(page, "hostile")
            assert _Stub.asked == []  # no picture was fetched


@pytest.fixture(scope="module")
def page_of_stub() -> Iterator[str]:
    with stub() as api:
        arguments = ["--host", "127.0.0.1", "--api", f"http://127.0.0.1:{api}", "--allowed_hosts", "chat.example"]
        with page_process("arriero.serving.ui.process", *arguments) as url:
            yield url


@pytest.fixture
def page(browser: Any, page_of_stub: str) -> Iterator[Page]:
    _Stub.told.clear()
    page, _ = opened(browser, page_of_stub)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield page
    page.context.close()


def test_only_this_machine_s_names_are_answered_and_no_frame_shows_the_page(browser: Any, page_of_stub: str) -> None:
    def answer(host: str, path: str = "/gradio_api/queue/join") -> httpx.Response:
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        return httpx.post(page_of_stub + path, headers={"host": host}, json=body)

    assert answer("evil.example").status_code == answer("evil.example:80", "/gradio_api/cancel").status_code == 421
    for host in ("localhost", "[::1]:8010", "chat.example"):
        assert answer(host).status_code not in (421, 403)
    headers = httpx.get(page_of_stub).headers
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    page = browser.new_page()
    frame = f'<iframe src="{page_of_stub}"></iframe>'
    page.route("http://other.example/", lambda route: route.fulfill(body=frame, content_type="text/html"))
    page.goto("http://other.example/")
    page.wait_for_timeout(500)
    assert page.frames[1].locator("#message").count() == 0
    page.close()


def test_html_is_text_as_it_was_typed(page: Page) -> None:
    code = "  fix this: #include <stdio.h> int main(){ vector<int> v; if (a<b && c>d) return 0; }"
    send(page, code)
    until(page, lambda: turns(page, "bot") == [f"You say {code.strip()}"])
    assert turns(page, "user") == [code.strip()]
    assert _Stub.told[-1]["messages"][-1]["content"] == code
    cover = (
        '&lt;b&gt; &amp; <div style="position:fixed;inset:0"><form action="/x"><input name="q"></form></div> `<i>`\n\n'
        "1. one\n   ```html\n   <p>&amp;</p>\n   ```\n\n$$<div style='position:fixed'>$$\n\n```\nif a < b: <half"
    )
    send(page, cover)
    until(page, lambda: len(turns(page, "bot")) == 2 and "half" in turns(page, "bot")[1])
    assert [message["content"] for message in _Stub.told[-1]["messages"][:2]] == [code, f"You say {code}"]
    assert _Stub.told[-1]["messages"][-1]["content"] == cover
    for seen in (turns(page, "user")[1], turns(page, "bot")[1]):
        assert (
            '&lt;b&gt; &amp; <div style="position:fixed;inset:0"><form action="/x"><input name="q"></form></div> <i>'
            in seen
        )
    shown = "#conversation .message.bot >> nth=1"
    assert [text.strip() for text in page.locator(f"{shown} >> pre code").all_inner_texts()] == [
        "<p>&amp;</p>",
        "if a < b: <half",
    ]
    assert page.locator(f"{shown} >> form, {shown} >> input").count() == 0
    assert page.locator("#conversation [style*=fixed]").count() == 0
    picture(page, "html")
    page.locator("#conversation button[aria-label*='opy message']").last.click()
    page.wait_for_timeout(200)
    assert page.evaluate("navigator.clipboard.readText()") == f"You say {cover}"
    page.locator("#roll_back").click()
    until(page, lambda: box(page) == cover)


def test_every_action_ends_an_answer_under_way_first(page: Page) -> None:
    start = "0 1 2 3 4"

    def counting() -> None:
        send(page, "count")
        until(page, lambda: any(turn.startswith(start) for turn in turns(page, "bot")[-1:]))

    def is_quiet() -> bool:
        before = turns(page, "bot")
        page.wait_for_timeout(400)
        return turns(page, "bot") == before

    for by in ("click", "key"):
        counting()
        page.locator("#message textarea").fill(f"next by {by}")
        page.locator("#send").click() if by == "click" else page.locator("#message textarea").press("Shift+Enter")
        until(page, lambda by=by: turns(page, "bot")[-1:] == [f"You say next by {by}"])
        assert turns(page, "bot")[-2].startswith(start)
        assert len(turns(page, "bot")[-2]) < 1000
        assert turns(page, "user")[-2:] == ["count", f"next by {by}"]
    roles = [message["role"] for message in _Stub.told[-1]["messages"]]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    assert is_quiet()

    counting()
    until(page, lambda: len(turns(page, "bot")[-1]) > 100)
    long = len(turns(page, "bot")[-1])
    page.locator("#regenerate").click()
    until(page, lambda: len(turns(page, "bot")[-1]) < long)
    until(page, lambda: turns(page, "bot")[-1].startswith(start))
    assert len(turns(page, "bot")) == 5
    page.locator("#message textarea").fill("a draft")
    page.locator("#roll_back").click()
    until(page, lambda: box(page) == "count\n\na draft")
    assert is_quiet()
    assert len(turns(page, "user")) == len(turns(page, "bot")) == 4

    for bin_icon in ("#clear", "#conversation button[aria-label='Clear']"):
        counting()
        page.locator(bin_icon).click()
        until(page, lambda: turns(page, "user") == [] and status(page) == "")
        assert is_quiet()
        assert turns(page, "bot") == []

    send(page, "silence")
    until(page, lambda: turns(page, "user") == ["silence"])
    page.wait_for_timeout(300)
    page.locator("#message textarea").fill("speech")
    for _ in range(3):
        page.locator("#message textarea").press("Shift+Enter")
    until(page, lambda: turns(page, "bot") == ["You say silence\n\nspeech"])
    assert _Stub.told[-1]["messages"] == [{"role": "user", "content": "silence\n\nspeech"}]
    page.locator("#send").click()  # with nothing to send
    assert is_quiet()
    assert turns(page, "user") == ["silence\n\nspeech"]


def test_a_message_without_an_answer_comes_back(page: Page) -> None:
    send(page, "fail")
    until(page, lambda: "no answer" in status(page) and box(page) == "fail")
    assert turns(page, "user") == []
    send(page, "break")
    until(page, lambda: "broke off" in status(page))
    assert turns(page, "bot") == ["You say break"]
    assert box(page) == ""
    send(page, "x" * 100_001)
    until(page, lambda: "too long" in status(page) and len(box(page)) == 100_001)
    assert len(_Stub.told) == 2
    assert "max_tokens" not in _Stub.told[0]  # the server knows its limit
    page.locator("#settings button").first.click()
    set_longest(page, 77)
    send(page, "short")
    until(page, lambda: len(turns(page, "bot")) == 2)
    assert _Stub.told[-1]["max_tokens"] == 77


def test_a_reload_keeps_all_but_the_key(page: Page) -> None:
    send(page, "<b>one</b>")
    until(page, lambda: turns(page, "bot") == ["You say <b>one</b>"])
    enter_key(page, "secret")
    page.locator("#system textarea").fill("Be kind.")
    set_longest(page, 77)
    send(page, "count")
    until(page, lambda: len(turns(page, "bot")) == 2 and len(turns(page, "bot")[1]) > 20)
    page.reload()
    page.wait_for_selector("#message textarea")
    until(page, lambda: len(turns(page, "bot")) == 2 and turns(page, "bot")[1].startswith("0 1 2"))
    assert page.locator("#key input").input_value() == ""
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    until(page, lambda: page.locator("#model input").input_value() == "evil")
    send(page, "two")
    until(page, lambda: len(turns(page, "bot")) == 3)
    assert [message["content"] for message in _Stub.told[-1]["messages"][:2]] == ["Be kind.", "<b>one</b>"]
    assert _Stub.told[-1]["max_tokens"] == 77
    assert page.locator(".toast-body").count() == 0


def test_the_page_is_heard_and_read_in_chinese(page: Page, browser: Any, page_of_stub: str) -> None:
    assert page.get_by_label("Message", exact=True).count() == 1
    assert "Shift+Enter" in str(page.locator("#message textarea").get_attribute("placeholder"))
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    fold = page.locator("#settings button").first
    assert fold.get_attribute("aria-expanded") == "false"
    fold.click()
    assert fold.get_attribute("aria-expanded") == "true"
    page.wait_for_timeout(300)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator("#key input").press_sequentially("abcdef")
    page.wait_for_timeout(300)
    assert asked == []
    for locale in ("zh-HK", "zh-TW", "zh-Hans-CN"):
        other, _ = opened(browser, page_of_stub, locale=locale)
        assert other.locator("#send").inner_text() == "发送"
        other.context.close()
