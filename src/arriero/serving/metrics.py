"""What Prometheus is told: requests, tokens, times, and where the engine stands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class _EngineCollector(Collector):
    """Reads the engine when it is asked. Whole numbers that another thread may change meanwhile: each is right by itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, blocks = self._engine.scheduler, self._engine.blocks
        for name, text, value in (
            ("requests_running", "Answers that are being computed", len(scheduler.running)),
            ("requests_waiting", "Answers that wait for a place", len(scheduler.waiting)),
            ("kv_blocks_used", "Blocks of keys and values that are in use", blocks.used),
            ("kv_blocks", "Blocks of keys and values in all", blocks.num_blocks),
            ("kv_usage_ratio", "Share of the blocks that is in use", blocks.used / blocks.num_blocks),
        ):
            yield GaugeMetricFamily(f"arriero_{name}", text, value=value)
        for name, text, value in (
            ("prefix_cache_queries", "Full blocks of prompts that were looked up", blocks.counters.asked),
            ("prefix_cache_hits", "Those that were held already", blocks.counters.found),
            ("kv_evictions", "Blocks whose content was given up", blocks.counters.evicted),
            ("preemptions", "Times that an answer lost its blocks for a while", scheduler.preemptions),
        ):
            yield CounterMetricFamily(f"arriero_{name}", text, value=value)
        if self._engine.speculation is not None:
            counters = self._engine.speculation.counters
            yield CounterMetricFamily("arriero_draft_tokens", "Tokens that were guessed", value=counters.proposed)
            yield CounterMetricFamily("arriero_accepted_draft_tokens", "Those that were right", value=counters.accepted)


class Metrics:
    """The numbers of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "arriero_http_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("arriero_http_in_flight", "Requests that are being answered", registry=registry)
        self.request_seconds = Histogram(
            "arriero_http_request_seconds",
            "From request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "arriero_time_to_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.between_tokens_seconds = Histogram(
            "arriero_inter_token_seconds",
            "From one token of an answer to the next",
            buckets=_BETWEEN,
            registry=registry,
        )
        self.prompt_tokens = Counter("arriero_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.cached_tokens = Counter("arriero_cached_prompt_tokens", "Those that the cache held", registry=registry)
        self.generated_tokens = Counter("arriero_generated_tokens", "Tokens of answers", ["model"], registry=registry)
        self.finished = Counter("arriero_answers", "Answers by how they ended", ["reason"], registry=registry)
        self.errors = Counter("arriero_errors", "Requests that failed, by status", ["status"], registry=registry)

    def forget(self, model: str) -> None:
        """Tell nothing more of a model that is gone: clients choose the names of adapters, of which there is no end."""
        for counter in (self.prompt_tokens, self.generated_tokens):
            with contextlib.suppress(KeyError):
                counter.remove(model)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
