"""What the requests of one rate come to. Names are those of `vllm bench serve`; times are in milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from arriero.serving.load.asking import Outcome


@dataclass(frozen=True)
class Times:
    """Of many values, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float | None]) -> Times | None:
        """None without a value."""
        values = 1e3 * np.asarray([value for value in seconds if value is not None], float)
        if not values.size:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(frozen=True)
class RateRecord:
    """One rate.

    Attributes:
        request_rate: requests a second that were meant to arrive; 0: all at once.
        duration: seconds from the first request to the end of the last answer.
        completed, failed: requests; `errors` says of what kind, with numbers.
        max_concurrent_requests: that were on their way at once.
        total_input_tokens, total_output_tokens: of completed requests, as the server counts them; None if it does not.
        request_throughput: completed requests a second.
        output_throughput, total_token_throughput: tokens a second, of answers, and with those of prompts.
        request_goodput: requests a second that kept to all objectives; None without any.
        ttft: from sending to the first text.
        tpot: of each answer the mean time of a token after the first.
        itl: between neighbouring parts of an answer, which may hold several tokens.
        e2el: from sending to the end.
        send_lag: how late requests were sent, which is this program's own doing.
    """

    request_rate: float
    requests: int
    duration: float
    completed: int
    failed: int
    errors: dict[str, int]
    max_concurrent_requests: int
    total_input_tokens: int | None
    total_output_tokens: int | None
    request_throughput: float
    output_throughput: float | None
    total_token_throughput: float | None
    request_goodput: float | None
    ttft: Times | None
    tpot: Times | None
    itl: Times | None
    e2el: Times | None
    send_lag: Times | None
    objectives: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rate: float,
        outcomes: Sequence[Outcome],
        seconds: float,
        concurrent: int,
        objectives: Mapping[str, float] | None = None,
    ) -> RateRecord:
        """
        Args:
            seconds: from the first request to the end of the last answer.
            concurrent: requests that were on their way at once, at most.
            objectives: `ttft`, `tpot`, `e2el` -> milliseconds.
        """
        done = [outcome for outcome in outcomes if not outcome.error]
        prompts = [outcome.prompt_tokens for outcome in done if outcome.prompt_tokens is not None]
        answers = [outcome.output_tokens for outcome in done if outcome.output_tokens is not None]
        counted = len(prompts) == len(answers) == len(done)
        tokens_in, tokens_out = (sum(prompts), sum(answers)) if counted else (None, None)
        good = sum(_is_good(outcome, objectives) for outcome in done) if objectives else None
        return cls(
            request_rate=rate,
            requests=len(outcomes),
            duration=seconds,
            completed=len(done),
            failed=len(outcomes) - len(done),
            errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
            max_concurrent_requests=concurrent,
            total_input_tokens=tokens_in,
            total_output_tokens=tokens_out,
            request_throughput=len(done) / seconds,
            output_throughput=None if tokens_out is None else tokens_out / seconds,
            total_token_throughput=None
            if tokens_in is None or tokens_out is None
            else (tokens_in + tokens_out) / seconds,
            request_goodput=None if good is None else good / seconds,
            ttft=Times.of([outcome.first_token for outcome in done]),
            tpot=Times.of([outcome.per_token for outcome in done]),
            itl=Times.of([gap for outcome in done for gap in outcome.gaps]),
            e2el=Times.of([outcome.whole for outcome in done]),
            send_lag=Times.of([outcome.lag for outcome in outcomes]),
            objectives=dict(objectives or {}),
        )


def _is_good(outcome: Outcome, objectives: Mapping[str, float]) -> bool:
    """Whether a request kept to all objectives; what it has no time of (no second token) it has not broken."""
    found = {"ttft": outcome.first_token, "tpot": outcome.per_token, "e2el": outcome.whole}
    values = ((found[name], limit) for name, limit in objectives.items())
    return all(value is None or 1e3 * value <= limit for value, limit in values)
