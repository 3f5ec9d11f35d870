"""A span of OpenTelemetry for each request, sent to a collector over OTLP/HTTP. Never a word of a prompt or an answer.

Needs the extra `otel`. Nothing is imported, and nothing sent, unless an option or OpenTelemetry's own variables ask for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from arriero import __version__
from arriero.errors import ConfigError, require

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# Any of these asks for spans as well; https://opentelemetry.io/docs/specs/otel/protocol/exporter/
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACES_PATH = "/v1/traces"
CLOSE_SECONDS = 3.0  # for the last spans to go out: a collector that is gone does not keep the server
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Tracing(Protocol):
    """What is told of each request once it is over."""

    def record(
        self, method: str, route: str, status: int, began: float, facts: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        """
        Args:
            route: as it is counted; the address itself could hold anything.
            began: by `time.perf_counter`.
            facts: what the log tells too; only what is known to be no text is taken.
            headers: of the request: `traceparent` names the caller's span.
        """

    def close(self) -> None:
        """Send what is left."""


class NoTracing:
    """None is wanted."""

    def record(self, *_: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class OtlpTracing:
    """Spans in batches, from a thread of the SDK."""

    def __init__(self, endpoint: str | None) -> None:
        """
        Args:
            endpoint: the collector's address; None: as OpenTelemetry's variables say.

        Raises:
            MissingExtraError: the extra is not installed.
        """
        trace = require("opentelemetry.sdk.trace", "otel")
        batches = require("opentelemetry.sdk.trace.export", "otel")
        resources = require("opentelemetry.sdk.resources", "otel")
        exporter = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", "otel").OTLPSpanExporter(endpoint)
        own = {"service.version": __version__}
        if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            own["service.name"] = "arriero"
        self._provider: TracerProvider = trace.TracerProvider(
            resource=resources.Resource.create(own), shutdown_on_exit=False
        )
        self._provider.add_span_processor(batches.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("arriero.serving", __version__)
        self._callers = require("opentelemetry.trace.propagation.tracecontext", "otel").TraceContextTextMapPropagator()
        self._api = require("opentelemetry.trace", "otel")

    def record(
        self, method: str, route: str, status: int, began: float, facts: Mapping[str, Any], headers: Mapping[str, str]
    ) -> None:
        """See `Tracing`."""
        end, seconds = time.time_ns(), time.perf_counter() - began
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._callers.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            start_time=end - int(1e9 * seconds),
            attributes=attributes(method, route, status, facts),
        )
        if status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """See `Tracing`."""
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)


def attributes(method: str, route: str, status: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a span, by OpenTelemetry's semantic conventions for HTTP and for generative models."""
    found: dict[str, Any] = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    if status >= 400:
        found["error.type"] = str(status)
    if "request_id" in facts:
        found["arriero.request_id"] = facts["request_id"]
    if "model" in facts:
        found["gen_ai.provider.name"] = "arriero"
        found["gen_ai.request.model"] = found["gen_ai.response.model"] = facts["model"]
        found["gen_ai.operation.name"] = _OPERATIONS.get(route, "other")
        found["gen_ai.usage.input_tokens"] = facts["prompt_tokens"]
        found["gen_ai.usage.output_tokens"] = facts["completion_tokens"]
        found["gen_ai.response.finish_reasons"] = facts["finish"].split(",")
    if "first_token_seconds" in facts:
        found["gen_ai.response.time_to_first_chunk"] = facts["first_token_seconds"]
    return found


def tracing_of(endpoint: str | None) -> Tracing:
    """What options and environment ask for.

    Args:
        endpoint: of `--otlp_traces_endpoint`.

    Raises:
        ConfigError: an address that is none.
        MissingExtraError: the extra is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return NoTracing()
    if endpoint is None:
        wanted = any(os.environ.get(name, "").strip() for name in ENDPOINTS)
        return OtlpTracing(None) if wanted and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp" else NoTracing()
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"--otlp_traces_endpoint {endpoint[:100]!r}: write http://HOST:4318")
    return OtlpTracing(endpoint if address.path.strip("/") else endpoint.rstrip("/") + TRACES_PATH)
