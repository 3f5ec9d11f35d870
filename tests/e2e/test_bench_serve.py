"""`arriero bench serve`: against a server whose times are known, one that misbehaves, and arriero's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from arriero.commands import bench
from arriero.config.parser import parse
from arriero.serving.load.asking import Outcome
from arriero.serving.load.prompts import arrivals, read_conversations, shuffled
from arriero.serving.load.record import RateRecord

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

Run = Callable[..., subprocess.CompletedProcess[str]]
FIRST, GAP, PARTS, TOKENS = (
    0.15,
    0.05,
    4,
    10,
)  # seconds, seconds, parts of an answer, tokens that the server says it has


class _Scripted(BaseHTTPRequestHandler):
    """Waits, answers in parts with pauses, and counts more tokens than parts."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._whole(200, {"object": "list", "data": [{"id": "scripted"}]})

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["authorization"])
            server.times.append(time.perf_counter())
            number = len(server.bodies)
        fault = server.faults[number % len(server.faults)] if server.faults and number > 1 else ""
        if fault == "busy":
            self._whole(429, {"error": {"message": "try again", "code": "queue_full"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        time.sleep(FIRST)
        for part in range(PARTS):
            if part:
                time.sleep(GAP)
            self._event({"choices": [{"index": 0, "delta": {"content": "wörter "}}]}, split=part == 1)
        if fault == "error":
            self._event({"error": {"message": "out of memory", "code": "internal_error"}})
        elif fault == "deep":
            self._raw(b"data: " + b"[" * 200_000 + b"\n\n")
        elif fault == "cut":
            self.close_connection = True
            return
        else:
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            if body.get("stream_options") == {"include_usage": True} and server.counts:
                self._event({"choices": [], "usage": server.usage})
            self._raw(b": a comment\r\n\r\ndata: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: Any, *, split: bool = False) -> None:
        data = b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
        for piece in (data[:40], data[40:]) if split else (data,):
            self._raw(piece)

    def _raw(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _whole(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def scripted() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
    server.request_queue_size, server.daemon_threads = 64, True
    server.lock, server.bodies, server.times, server.keys = threading.Lock(), [], [], set()
    server.faults, server.counts = [], True
    server.usage = {"prompt_tokens": 7, "completion_tokens": TOKENS}
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_times_are_those_of_the_server(
    in_process: Run, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARRIERO_API_KEY", "a-key-of-mine")
    found = in_process(
        "bench", "serve", "--base_url", scripted.url, "--rates", "20,0", "--num_requests", "12", "--max_new_tokens", "9",
        "--goodput", "ttft:5000", "tpot:1", "--output_file", str(tmp_path / "load.json"), "--plot", str(tmp_path / "load.png"),
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    told = json.loads((tmp_path / "load.json").read_text())
    assert (told["model"], told["max_tokens"], told["num_requests"]) == ("scripted", 9, 12)
    assert [rate["request_rate"] for rate in told["rates"]] == [20, 0]
    for rate in told["rates"]:
        assert (rate["completed"], rate["failed"], rate["errors"]) == (12, 0, {})
        assert (rate["total_input_tokens"], rate["total_output_tokens"]) == (12 * 7, 12 * TOKENS)
        assert rate["output_throughput"] == pytest.approx(12 * TOKENS / rate["duration"])
        assert rate["total_token_throughput"] == pytest.approx(12 * (7 + TOKENS) / rate["duration"])
        assert (
            rate["request_goodput"] == 0
        )  # no server could keep to the second objective, though all keep to the first
        # a busy machine makes them longer, by a second at times, and nothing makes them shorter
        whole = FIRST + (PARTS - 1) * GAP
        assert 1e3 * FIRST <= rate["ttft_ms"]["p50"] < 1e3 * FIRST + 2000
        assert 1e3 * GAP <= rate["itl_ms"]["p50"] < 1e3 * GAP + 500
        assert 1e3 * (PARTS - 1) * GAP / (TOKENS - 1) <= rate["tpot_ms"]["p50"] < 500
        assert 1e3 * whole <= rate["e2el_ms"]["p50"] < 1e3 * whole + 3000
        assert rate["e2el_ms"]["p50"] <= rate["e2el_ms"]["p90"] <= rate["e2el_ms"]["p99"] <= rate["e2el_ms"]["max"]
    # open loop: requests came at their times, before the first was answered
    assert told["rates"][1]["max_concurrent_requests"] == 12
    sent = np.asarray(sorted(scripted.times)[1:13])
    assert (
        np.abs((sent - sent[0]) - np.asarray(arrivals(12, 20.0, 0))).max() < 1
    )  # one after the other they would be late by seconds
    assert scripted.keys == {"Bearer a-key-of-mine"}
    prompts = [body["messages"][-1]["content"] for body in scripted.bodies]
    assert len(set(prompts)) == len(prompts) == 25
    assert all("a-key-of-mine" not in text for text in (found.stdout, json.dumps(told)))
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_failures_are_counted_by_their_kind(in_process: Run, scripted: Any, tmp_path: Path) -> None:
    scripted.faults = ["busy", "error", "cut", ""]
    place = tmp_path / "load.json"
    found = in_process(
        "bench", "serve", "--base_url", scripted.url, "--rates", "0", "--num_requests", "16", "--output_file", str(place)
    )  # fmt: skip
    assert found.returncode == 0
    rate = json.loads(place.read_text())["rates"][0]
    assert (rate["completed"], rate["failed"], rate["total_output_tokens"]) == (4, 12, 4 * TOKENS)
    assert sorted(rate["errors"].values()) == [4, 4, 4]
    assert {"HTTP 429 queue_full", "error in the stream: internal_error"} < rate["errors"].keys()
    assert "  4 failed: HTTP 429 queue_full\n" in found.stdout
    scripted.faults, scripted.counts = [], False
    found = in_process("bench", "serve", "--base_url", scripted.url, "--rates", "0", "--num_requests", "2")
    assert "the server does not say how many tokens" in found.stdout


def test_a_load_without_an_answer_is_no_success(in_process: Run, scripted: Any, tmp_path: Path) -> None:
    scripted.faults = ["deep"]
    place = tmp_path / "load.json"
    given = ("bench", "serve", "--base_url", scripted.url, "--num_requests", "3", "--output_file", str(place))
    found = in_process(*given, "--rates", "0", "50")
    assert found.returncode == 1
    assert found.stderr == f"arriero: none of 6 requests was answered by {scripted.url}: see above why\n"
    rates = json.loads(place.read_text())["rates"]
    assert [rate["errors"] for rate in rates] == 2 * [{"an event of the stream is not OpenAI's": 3}]
    scripted.bodies, scripted.faults = [], ["deep", ""]
    assert in_process(*given, "--rates", "0").returncode == 0


@pytest.mark.parametrize("count", [-174, float("inf"), 1.5, True, "7", 10**400, None])
def test_a_count_of_tokens_that_cannot_be_is_none(in_process: Run, scripted: Any, count: object) -> None:
    scripted.usage = {"prompt_tokens": 7, "completion_tokens": count}
    found = in_process("bench", "serve", "--base_url", scripted.url, "--rates", "0", "--num_requests", "1")
    assert (found.returncode, found.stderr) == (0, "")
    assert "the server does not say how many tokens" in found.stdout


def test_keys_are_taken_from_between_spaces(in_process: Run, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("bench", "serve", "--base_url", f" {scripted.url}/", "--rates", "0", "--num_requests", "1")
    monkeypatch.setenv("ARRIERO_API_KEY", " \n")
    monkeypatch.setenv("OPENAI_API_KEY", "abc\n")
    assert in_process(*given).returncode == 0
    assert scripted.keys == {"Bearer abc"}
    for key, place in (("éé", "--api_key"), ("a\nHost: b", "--api_key"), (" ", "$ARRIERO_API_KEY")):
        monkeypatch.setenv("ARRIERO_API_KEY", "a\x7fb")
        found = in_process(*given, "--api_key", key)
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == f"arriero: {place}: a key is printable ASCII in one line, and this one is not\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "decode"), "measure them one after the other"),
        (("serve", "--base_url", "ftp://x/v1"), "--base_url 'ftp://x/v1': write"),
        (("serve", "--base_url", "http://127.0.0.1:99999/v1"), "write http://HOST:PORT/v1"),
        (("serve", "--base_url", "http://[::1/v1"), "--base_url 'http://[::1/v1': write http://HOST:PORT/v1"),
        (("serve", "--base_url", f"http://{'a' * 70}/v1"), "write http://HOST:PORT/v1"),
        (("serve", "--base_url", "http://127.0.0.1/a b/v1"), "write http://HOST:PORT/v1"),
        (("serve", "--goodput", "ttft:soon"), "--goodput 'ttft:soon': write"),
        (("serve", "--goodput", "speed:5"), "--goodput 'speed:5': write"),
        (("serve", "--rates", "-1"), "--rates is -1"),
        (("serve", "--data_file", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("serve", "--base_url", "http://127.0.0.1:1/v1"), "no answer from http://127.0.0.1:1/v1/models (connection refused)"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line(in_process: Run, arguments: tuple[str, ...], message: str) -> None:
    found = in_process("bench", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1
    assert message in found.stderr


def test_options_of_the_other_half_are_told(in_process: Run, scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--base_url", scripted.url, "--num_requests", "1", "--rates", "0"]
    found = in_process("bench", "serve", *given, "--batch_sizes", "3", "--model_name_or_path", "x")
    assert found.returncode == 0
    assert "--batch_sizes has no effect in bench serve" in found.stderr
    assert "--model_name_or_path has no effect in bench serve: --model names" in found.stderr
    parse(bench.OPTIONS, ["decode", "--model_name_or_path", "mine", "--ignore_eos"], "arriero bench")
    assert "--ignore_eos has no effect without bench serve" in capsys.readouterr().err


def test_options_of_other_workloads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shared_length", "7", "--prompt_lengths", "9", "--context_length", "8", "--max_running", "3"]
    given += ["--model_name_or_path", "mine"]
    parse(bench.OPTIONS, ["decode", *given, "--src_length", "7"], "arriero bench")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--prompt_lengths, --max_running, --shared_length, --context_length have no effect in bench decode" in told
    parse(bench.OPTIONS, ["prefill", "mixed", *given[-2:], "--batch_sizes", "3"], "arriero bench")
    assert "--batch_sizes has no effect in bench prefill mixed" in capsys.readouterr().err
    parse(bench.OPTIONS, [*given, "--batch_sizes", "3"], "arriero bench")
    assert capsys.readouterr().err == ""


def test_arrivals_are_a_poisson_process() -> None:
    times = np.asarray(arrivals(20_001, 4.0, 7))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)
    # numbers in windows of a second have mean and variance 4; gaps exceed t with probability exp(-4 t)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(4, rel=0.05)
    assert counts.var() == pytest.approx(4, rel=0.1)
    for limit in (0.1, 0.25, 0.5):
        assert (gaps > limit).mean() == pytest.approx(np.exp(-4 * limit), abs=0.01)
    assert np.allclose(arrivals(50, 8.0, 7), times[:50] / 2)
    assert arrivals(3, 0.0, 1) == [0.0, 0.0, 0.0]


def test_prompts_come_again_only_when_all_have_come(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows: list[Any] = [{"src": f"row {number}", "tgt": ""} for number in range(5)] + [{"messages": turns}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = read_conversations(str(file))
    assert own[0] == [{"role": "user", "content": "row 0"}]
    assert own[5] == turns
    drawn = shuffled(own, 16, 1)
    keys = [json.dumps(one) for one in drawn]
    assert len(set(keys[:6])) == len(set(keys[6:12])) == 6
    assert len(set(keys[12:])) == 4
    assert shuffled(own, 16, 1) == drawn != shuffled(own, 16, 2)


def test_goodput_is_by_all_objectives() -> None:
    def outcome(first: float, token: float) -> Outcome:
        return Outcome(
            began=1.0, texts=[1 + first, 1 + first + 9 * token], ended=1 + first + 9 * token, output_tokens=10
        )

    outcomes = [outcome(0.1, 0.01), outcome(0.3, 0.01), outcome(0.1, 0.03), Outcome(error="x", ended=2.0)]
    limits = {"ttft": 200.0, "tpot": 20.0}
    assert RateRecord.of(1.0, outcomes, 2.0, 4, limits).request_goodput == 0.5
    assert RateRecord.of(1.0, outcomes, 2.0, 4, {"ttft": 200.0}).request_goodput == 1.0
    record = RateRecord.of(1.0, outcomes, 2.0, 4, {"e2el": 250.0})
    assert record.request_goodput == 0.5
    assert record.ttft is not None
    assert record.ttft.p50 == pytest.approx(100)
    assert record.total_input_tokens is None  # not counted by the server


@pytest.mark.slow
def test_arrieros_own_server(arriero: Run, tmp_path: Path) -> None:
    """The figures are those of the server's metrics, and torch is not imported."""
    with Served("--max_queue_size", "400") as served:
        script = (
            "import sys\nfrom arriero.cli import main\n"
            f"code = main(['bench', 'serve', '--base_url', '{served.api}', '--api', 'completions', '--rates', '40',\n"
            "    '--num_requests', '24', '--max_new_tokens', '12', '--ignore_eos', '--output_file', 'load.json'])\n"
            "assert 'torch' not in sys.modules\nsys.exit(code)\n"
        )
        environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        metrics = httpx.get(f"{served.url}/metrics").text
    told = json.loads((tmp_path / "load.json").read_text())
    [rate] = told["rates"]
    assert told["model"] == TINY.rpartition("/")[2] or told["model"] == TINY
    assert (rate["completed"], rate["total_output_tokens"]) == (24, 24 * 12)
    generated = re.search(r"^arriero_generated_tokens_total\{[^}]*\} ([0-9.]+)$", metrics, re.MULTILINE)
    prompts = re.search(r"^arriero_prompt_tokens_total\{[^}]*\} ([0-9.]+)$", metrics, re.MULTILINE)
    assert generated is not None
    assert prompts is not None
    assert float(generated[1]) == 25 * 12  # with the request before all others
    assert rate["total_input_tokens"] < float(prompts[1]) < 1.2 * rate["total_input_tokens"]
