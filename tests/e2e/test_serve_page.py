"""The web page in a real browser (Debian's chromium), against a real server with a key."""

from __future__ import annotations

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
    enter_key(page, "a-wrong-key-that-is-long")
    send(page, "Hello again")
    until(page, lambda: "not one of this server's" in status(page))
    picture(page, "wrong-key")
    page.locator("#clear").click()
    until(page, lambda: turns(page, "user") == [])
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
    assert page.locator("#message textarea").input_value() == "And now?"
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
    """An API whose model is hostile."""

    asked: ClassVar[list[str]] = []
    told: ClassVar[list[Any]] = []  # the messages of each request

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self._answer("application/json", json.dumps({"data": [{"id": "evil"}]}))

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"])
        text = hostile(self.server.server_address[1])
        deltas = [{"reasoning_content": f"I am sly. {text}"}, {"content": text}]
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        self._answer("text/event-stream", f"{lines}data: [DONE]\n\n")

    def _answer(self, media: str, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("content-type", media)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def test_what_the_model_writes_cannot_act_and_a_server_may_come_back(browser: Any) -> None:
    api, port = free_port(), free_port()
    command = [sys.executable, "-m", "arriero", "serve", "--port", str(port), "--api_url", f"http://127.0.0.1:{api}/v1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.DEVNULL)
    try:
        wait_for_page(f"http://127.0.0.1:{port}")
        page, _ = opened(browser, f"http://127.0.0.1:{port}")
        send(page, "Are you there?")
        until(page, lambda: "does not answer" in status(page))
        stub = http.server.ThreadingHTTPServer(("127.0.0.1", api), _Stub)
        threading.Thread(target=stub.serve_forever, args=(0.05,), daemon=True).start()
        page.locator("#regenerate").click()
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
        roles = [[message["role"] for message in messages] for messages in _Stub.told]
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
        stub.shutdown()
        stub.server_close()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
