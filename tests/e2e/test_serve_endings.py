"""Beginnings and ends of a server: what it refuses to start with, full queues, time limits, SIGTERM."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

LONG: dict[str, Any] = {"prompt": "To be", "max_tokens": 2000, "ignore_eos": True, "stream": True}
Run = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


def test_a_full_queue_a_time_limit_and_a_rate(tmp_path: Path) -> None:
    limits = [
        "--max_batch_size",
        "1",
        "--max_queue_size",
        "1",
        "--request_timeout",
        "1.5",
        "--requests_per_minute",
        "20",
    ]
    with Served(*limits) as served, httpx.Client(base_url=served.api, timeout=60) as http:

        def answer() -> list[str]:
            with http.stream("POST", "/completions", json=LONG) as response:
                assert response.status_code == 200
                return [line for line in response.iter_lines() if line]

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            began = time.monotonic()
            first = pool.submit(answer)
            wait_for(lambda: "arriero_requests_running 1.0" in metrics(served))
            second = pool.submit(answer)
            wait_for(lambda: "arriero_requests_waiting 1.0" in metrics(served))
            third = http.post("/completions", json={**LONG, "stream": False})
            assert third.status_code == 429
            assert third.json()["error"]["code"] == "queue_full"
            assert 1 <= int(third.headers["retry-after"]) <= 60
            for stream in (first, second):
                lines = stream.result(30)
                last = json.loads(lines[-1].removeprefix("data: "))
                assert last["error"]["code"] == "timeout"
                assert "data: [DONE]" not in lines
            assert time.monotonic() - began < 10
        late = http.post("/completions", json={**LONG, "stream": False})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        wait_for(lambda: "arriero_requests_running 0.0" in metrics(served))
        assert int(late.headers["x-ratelimit-remaining-requests"]) < 20
        many = [http.post("/completions", json={}) for _ in range(25)]
        refused = next(one for one in many if one.status_code == 429)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        with openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=TINY, prompt="x", max_tokens=1)
            # which waits as long as it is told, and tries again
            patient = client.with_options(max_retries=3)
            assert patient.completions.create(model=TINY, prompt="x", max_tokens=1).choices


def metrics(served: Served) -> str:
    return httpx.get(f"{served.url}/metrics").text


def test_sigterm_lets_answers_end_and_new_ones_go_elsewhere() -> None:
    with Served("--drain_timeout", "30") as served:
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream(
                "POST", f"{served.api}/completions", json={**LONG, "max_tokens": 700}, timeout=60
            ) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(20)
        assert httpx.get(f"{served.url}/health/ready").status_code == 200
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{served.url}/health/ready").status_code == 503)
        assert httpx.get(f"{served.url}/health/live").status_code == 200
        refused = httpx.post(f"{served.api}/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"]
        reader.join(60)
        assert lines[-2:] == ["data: [DONE]", ""]
        last = json.loads(lines[-4].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(20) == 0
    assert [line["event"] for line in served.log if line["event"] in ("ready", "shutdown", "stopped")] == [
        "ready",
        "shutdown",
        "stopped",
    ]


def test_what_is_not_finished_in_time_is_told() -> None:
    with Served("--drain_timeout", "0.3") as served:
        with httpx.stream("POST", f"{served.api}/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert served.process.wait(20) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with Served() as served, httpx.stream("POST", f"{served.api}/completions", json=LONG, timeout=60) as answer:
        next(answer.iter_lines())
        began = time.monotonic()
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        served.process.send_signal(signal.SIGINT)
        served.process.wait(20)
        assert time.monotonic() - began < 8


# Texts for which the tiny model needs seconds; each of them tens of milliseconds.
TEXTS: dict[str, Any] = {"input": [[5] * 1900] * 150}
TOKENS = 150 * 1900


def embeddings_logged(served: Served) -> list[dict[str, Any]]:
    return [line for line in served.log if line.get("path") == "/v1/embeddings"]


def leave_early(served: Served) -> None:
    """Ask for vectors and close the connection when they are being computed."""
    body = json.dumps(TEXTS).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(1.2)


def test_embeddings_end_with_their_client() -> None:
    """And SIGTERM does not wait for one who has left."""
    with Served("--drain_timeout", "60") as served:
        leave_early(served)
        wait_for(lambda: bool(embeddings_logged(served)))
        leave_early(served)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
    lines = embeddings_logged(served)
    assert [line["status"] for line in lines] == [499, 499]
    assert all(line["prompt_tokens"] < TOKENS for line in lines)
    assert [line["event"] for line in served.log if line["level"] != "info"] == []


def test_embeddings_have_the_time_of_a_request_and_of_the_drain() -> None:
    with Served("--request_timeout", "1.5", "--drain_timeout", "0.2") as served:
        late = httpx.post(f"{served.api}/embeddings", json=TEXTS, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{served.api}/embeddings", json=TEXTS, timeout=60)
            time.sleep(0.4)
            served.process.send_signal(signal.SIGTERM)
            told = asked.result()
        assert (told.status_code, told.json()["error"]["code"]) == (503, "shutting_down")
        assert served.process.wait(20) == 0
    assert [line["event"] for line in served.log if "trace" in line] == []


def test_answers_go_on_between_texts() -> None:
    """A text and a step by turns, with several requests for vectors too; those that run are finished within the drain."""
    with Served("--drain_timeout", "60") as served, concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = {"input": TEXTS["input"][:50]}
        asked = [pool.submit(httpx.post, f"{served.api}/embeddings", json=texts, timeout=120) for _ in range(3)]
        time.sleep(0.3)
        short = {"prompt": "x", "max_tokens": 20, "ignore_eos": True}
        assert (
            httpx.post(f"{served.api}/completions", json=short, timeout=60).json()["usage"]["completion_tokens"] == 20
        )
        assert not any(one.done() for one in asked)  # about 20 of 150 texts
        served.process.send_signal(signal.SIGTERM)
        assert [one.result().status_code for one in asked] == [200] * 3
        assert served.process.wait(20) == 0
    assert [line["prompt_tokens"] for line in embeddings_logged(served)] == [TOKENS // 3] * 3


def test_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    with Served("--ssl_certfile", str(certificate), "--ssl_keyfile", str(key), "--log_prompts") as served:
        assert served.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{served.api}/models", verify=trusted).status_code == 200
        asked = {"prompt": "a secret", "max_tokens": 3}
        answer = httpx.post(f"{served.api}/completions", json=asked, verify=trusted).json()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.api}/models")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{served.port}/v1/models")
    [line] = [line for line in served.log if line.get("path") == "/v1/completions"]
    assert (line["prompts"], line["answers"]) == (["a secret"], [answer["choices"][0]["text"]])


def test_what_cannot_be_is_said_before_the_model_is_loaded(in_process: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, content, message in (
            (["--flask_port", port], None, "cannot listen on 127.0.0.1 port"),
            (["--api_key_file", str(keys)], "short\n", "the API key 'key-1' is not usable"),
            (["--api_key_file", str(keys)], "# none\n", "holds no key"),
            (["--api_key_file", str(keys)], "a b c\n", "write NAME KEY"),
            (["--api_key_file", "missing"], None, "cannot be read"),
            (["--ssl_certfile", "missing"], None, "cannot be used"),
            (["--cors_origins", "*"], None, "would let every web page"),
            (["--adapters", "x"], None, "write NAME=FOLDER"),
            (["--max_step_tokens", "4"], None, "less than --max_batch_size"),
        ):
            if content is not None:
                keys.write_text(content, encoding="utf-8")
            result = in_process("serve", "no/such-model", "--flask_port", "0", *arguments)
            assert result.returncode == 2
            assert message in result.stderr, result.stderr
            assert len(result.stderr.splitlines()) == 1


def test_a_public_address_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from arriero.config.serving import ServeOptions
    from arriero.serving import hosting

    monkeypatch.delenv("ARRIERO_API_KEY", raising=False)
    monkeypatch.setattr(hosting, "bind", lambda host, port: socket.socket())
    for host, count in (
        ("127.0.0.1", 0),
        ("::1", 0),
        ("localhost", 0),
        ("0.0.0.0", 2),
        ("192.0.2.1", 2),
        ("example", 2),
    ):
        entrance = hosting.Entrance.of(ServeOptions(host=host))
        entrance.listener.close()
        assert len(entrance.warnings) == count, host
    monkeypatch.setenv("ARRIERO_API_KEY", "x" * 20)
    entrance = hosting.Entrance.of(ServeOptions(host="0.0.0.0"))
    entrance.listener.close()
    assert [re.search("unencrypted", warning) is not None for warning in entrance.warnings] == [True]


class Launched:
    """Two processes that serve one model together, and their launcher."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "arriero", "launch", "--nproc_per_node", "2", "serve", TINY, "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--flask_port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Launched:
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if "is served on" in line:
                self.api = next(word for word in line.split() if word.startswith("http://"))
                return self
        raise AssertionError(lines)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)

    def rank(self, number: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "serve" in child.cmdline() and child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"there is no rank {number}")

    def rest(self) -> str:
        """What is printed up to the end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def stream(self, begun: threading.Event, tokens: int) -> list[str]:
        """The lines of a long answer."""
        lines = []
        body = {**LONG, "max_tokens": tokens}
        with httpx.stream("POST", f"{self.api}/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()
        return [line for line in lines if line]


@pytest.mark.slow
def test_two_ranks_serve_the_tokens_of_one() -> None:
    """And the end of one of them is the end of the service, in a clear line and within ten seconds; clients hear of it."""
    ask = {"prompt": "To be or not to be", "max_tokens": 16, "temperature": 0}
    with Served() as served:
        wanted = httpx.post(f"{served.api}/completions", json=ask).json()["choices"][0]["text"]
    with Launched() as launched, concurrent.futures.ThreadPoolExecutor(3) as pool:
        told = httpx.post(f"{launched.api}/completions", json=ask, timeout=60)
        assert told.json()["choices"][0]["text"] == wanted
        events = [threading.Event() for _ in range(3)]
        streams = [pool.submit(launched.stream, event, 2000) for event in events]
        assert all(event.wait(30) for event in events)
        began = time.monotonic()
        launched.rank(1).kill()
        for stream in streams:
            assert json.loads(stream.result(10)[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert launched.process.wait(20) != 0
        assert time.monotonic() - began < 10
        rest = launched.rest()
        assert re.search(r"arriero \[rank 1\]: killed by SIGKILL", rest), rest


@pytest.mark.slow
def test_two_ranks_finish_what_runs() -> None:
    """The launcher sends its signal to both, and the second is needed to the end."""
    with Launched() as launched, concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        stream = pool.submit(launched.stream, begun, 300)
        assert begun.wait(30)
        launched.process.send_signal(signal.SIGTERM)
        lines = stream.result(60)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert launched.process.wait(20) == 0, launched.rest()
