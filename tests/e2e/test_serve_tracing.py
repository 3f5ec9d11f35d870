"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import contextlib
import gzip
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

from arriero.errors import ConfigError
from arriero.serving.tracing import NoTracing, OtlpTracing, tracing_of

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

SECRET = "the mule knows the password"
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"  # of the W3C's own example
SERVER = 2  # opentelemetry.proto.trace.v1.Span.SPAN_KIND_SERVER


class Collector:
    """An OTLP/HTTP collector on this machine.

    Attributes:
        bodies: that were sent to it, as (path, bytes).
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                bodies.append(
                    (self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                )
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
        """Each span with its attributes and those of its resource."""
        found = []
        for path, body in self.bodies:
            assert path == "/v1/traces"
            request = service.ExportTraceServiceRequest()
            request.ParseFromString(body)
            for resource in request.resource_spans:
                about = values(resource.resource.attributes)
                found += [
                    (span, values(span.attributes), about) for scope in resource.scope_spans for span in scope.spans
                ]
        return found


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for item in attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with contextlib.closing(Collector()) as found:
        yield found


def test_a_span_for_each_request(collector: Collector) -> None:
    with Served("--otlp_traces_endpoint", collector.url, "--log_prompts") as served:
        before = time.time()
        ask = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "temperature": 0}
        given = httpx.post(f"{served.api}/completions", json=ask, headers={"traceparent": CALLER, "tracestate": "a=b"})
        answer = given.json()
        chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "ignore_eos": True, "stream": True}
        assert "[DONE]" in httpx.post(f"{served.api}/chat/completions", json=chat).text
        assert httpx.post(f"{served.api}/completions", json={"prompt": SECRET, "model": "other"}).status_code == 404
        assert httpx.get(f"{served.url}/{SECRET.replace(' ', '/')}").status_code == 404
        assert httpx.get(f"{served.url}/health/ready").status_code == 200
        httpx.get(f"{served.url}/metrics")
        after = time.time()
    # the end of the server sends what was left
    spans = {span.name + str(found["http.response.status_code"]): (span, found) for span, found, _ in collector.spans()}
    assert spans.keys() == {
        "POST /v1/completions200", "POST /v1/chat/completions200", "POST /v1/completions404", "GET other404"
    }  # fmt: skip
    assert len(collector.spans()) == 4
    for _, _, about in collector.spans():
        assert about["service.name"] == "arriero"
    span, found = spans["POST /v1/completions200"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(CALLER.split("-")[1:3])
    assert (span.trace_state, span.kind) == ("a=b", SERVER)
    assert before - 1 < span.start_time_unix_nano / 1e9 < span.end_time_unix_nano / 1e9 < after + 1
    assert found["gen_ai.request.model"] == TINY
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 0 < found["gen_ai.response.time_to_first_chunk"] < seconds + 0.001
    assert found["arriero.request_id"] == given.headers["x-request-id"]
    assert (found["http.request.method"], found["http.route"]) == ("POST", "/v1/completions")
    span, found = spans["POST /v1/chat/completions200"]
    assert span.parent_span_id == b""  # nobody else's
    assert (found["gen_ai.operation.name"], found["gen_ai.usage.output_tokens"]) == ("chat", 3)
    span, found = spans["POST /v1/completions404"]
    assert (span.status.code, found["error.type"]) == (
        0,
        "404",
    )  # by the conventions a client's mistake is no error here
    assert "gen_ai.request.model" not in found
    sent = b"".join(body for _, body in collector.bodies)
    words = [SECRET, answer["choices"][0]["text"].strip(), *SECRET.split()]
    assert not [word for word in words if word and len(word) > 4 and word.encode() in sent]


def test_who_asks_for_them(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(tracing_of(None), NoTracing)
    for wrong in ("localhost:4318", "ftp://host", "http://"):
        with pytest.raises(ConfigError, match="write http://HOST:4318"):
            tracing_of(wrong)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracing = tracing_of(None)
    tracing.record(
        "POST", "/v1/completions", 500, time.perf_counter() - 2, {"request_id": "x"}, {"traceparent": "junk"}
    )
    tracing.close()
    [(span, found, about)] = collector.spans()
    assert about["service.name"] == "mine"
    assert 2e9 <= span.end_time_unix_nano - span.start_time_unix_nano < 3e9
    assert (span.status.code, found["error.type"], span.parent_span_id) == (2, "500", b"")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert isinstance(tracing_of(None), NoTracing)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert isinstance(tracing_of(collector.url), NoTracing)


def test_a_collector_that_is_gone_holds_nothing_up() -> None:
    tracing = OtlpTracing("http://127.0.0.1:9/v1/traces")
    began = time.monotonic()
    for _ in range(100):
        tracing.record("GET", "/v1/models", 200, time.perf_counter(), {}, {})
    assert time.monotonic() - began < 1
    tracing.close()
    assert time.monotonic() - began < 6
