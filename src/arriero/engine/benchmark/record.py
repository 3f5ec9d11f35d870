"""What the runs of a job come to: rates, latencies, and shares of what the machine can reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arriero.engine.benchmark.measured import Job, Run, Step
from arriero.engine.benchmark.peer import PeerRun
from arriero.engine.benchmark.work_cost import WorkCost


@dataclass(frozen=True)
class Peak:
    """What the machine reached at best, measured.

    Attributes:
        flops: FLOP/s of a matrix product.
        bandwidth: bytes read a second.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Latency:
    """Percentiles over all requests of all runs, in milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency | None:
        """None without a value."""
        if not seconds:
            return None
        p50, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 99))
        return cls(float(p50), float(p99))


@dataclass(frozen=True)
class Phase:
    """The steps of one kind: those that compute prompts, or those that only go on with answers. Medians over the runs.

    Attributes:
        steps: in a run.
        tokens_per_second: tokens computed.
        gflops: billions of floating-point operations a second that the model needs.
        gigabytes: billions of bytes a second that the model must read: weights, keys and values.
        peak_flops_share, peak_bandwidth_share: of what the machine reached at best.
    """

    steps: int
    tokens_per_second: float
    gflops: float
    gigabytes: float
    peak_flops_share: float
    peak_bandwidth_share: float

    @classmethod
    def of(cls, runs: Sequence[list[Step]], cost: WorkCost, peak: Peak) -> Phase | None:
        """None where there is no such step."""
        if not all(runs):
            return None

        def rate(amount: Callable[[Step], float]) -> float:
            return statistics.median(sum(map(amount, steps)) / sum(step.seconds for step in steps) for steps in runs)

        flops, read = rate(lambda step: cost.flops(step.pieces)), rate(lambda step: cost.bytes(step.pieces))
        return cls(
            steps=len(runs[0]),
            tokens_per_second=rate(lambda step: float(sum(piece.count for piece in step.pieces))),
            gflops=flops / 1e9,
            gigabytes=read / 1e9,
            peak_flops_share=flops / peak.flops,
            peak_bandwidth_share=read / peak.bandwidth,
        )


@dataclass(frozen=True)
class Comparison:
    """Another program on the same job.

    Attributes:
        seconds: median of its runs.
        ratio: median over the rounds of its seconds by ours: above 1, ours is faster.
        ratios: of each round.
        equal_answers: the share of answers that are ours, token for token.
    """

    seconds: float
    ratio: float
    ratios: tuple[float, ...]
    equal_answers: float

    @classmethod
    def of(cls, ours: Sequence[Run], theirs: Sequence[PeerRun]) -> Comparison:
        ratios = tuple(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
        equal = [x == y for x, y in zip(ours[-1].answers, theirs[-1].answers, strict=True)]
        seconds = statistics.median(run.seconds for run in theirs)
        return cls(seconds, statistics.median(ratios), ratios, sum(equal) / len(equal))


@dataclass(frozen=True)
class SharedWork:
    """What the cache of beginnings spares, from one run without it.

    Attributes:
        computed_without, computed_with: tokens of prompts that were computed.
        work_ratio: the first by the second.
        time_ratio: seconds of the whole job without the cache by those with it.
    """

    computed_without: int
    computed_with: int
    work_ratio: float
    time_ratio: float


@dataclass(frozen=True)
class Record:
    """The figures of a job: medians of its runs.

    Attributes:
        seconds: of the whole job.
        output_tokens_per_second: tokens of answers, in the time of the whole job.
        total_tokens_per_second: with those of the prompts, spared ones too.
        computed_prompt_tokens: of a run; fewer than `prompt_tokens` where the cache had some, more where requests lost their
            blocks.
        first_token: from handing in; all requests come at once, so waiting for a turn counts.
        next_token: between neighbouring tokens of an answer; None where answers have one.
        prompts, answers: the two kinds of steps.
        scheduler_share: of the steps' time, what is neither the model's nor the sampler's.
        sampling_share: of the steps' time.
        shared: what the cache spared.
        against: other programs on the same job, by name.
    """

    workload: str
    case: str
    requests: int
    max_running: int
    prompt_tokens: int
    output_tokens: int
    runs: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    computed_prompt_tokens: int
    preemptions: int
    first_token: Latency | None
    next_token: Latency | None
    prompts: Phase | None
    answers: Phase | None
    scheduler_share: float
    sampling_share: float
    shared: SharedWork | None = None
    against: dict[str, Comparison] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, runs: Sequence[Run], cost: WorkCost, peak: Peak, **more: Any) -> Record:
        """
        Args:
            more: `shared` and `against`.
        """
        seconds = statistics.median(run.seconds for run in runs)
        sampling = [sum(s.sampling_seconds for s in run.steps) / sum(s.seconds for s in run.steps) for run in runs]
        return cls(
            workload=job.workload,
            case=job.case,
            requests=len(job.prompts),
            max_running=job.max_running,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
            runs=len(runs),
            seconds=seconds,
            output_tokens_per_second=job.output_tokens / seconds,
            total_tokens_per_second=(job.prompt_tokens + job.output_tokens) / seconds,
            computed_prompt_tokens=computed_prompt_tokens(job, runs[-1]),
            preemptions=runs[-1].preemptions,
            first_token=Latency.of([value for run in runs for value in run.first_tokens]),
            next_token=Latency.of([value for run in runs for value in run.gaps]),
            prompts=Phase.of([[step for step in run.steps if step.prompts] for run in runs], cost, peak),
            answers=Phase.of([[step for step in run.steps if not step.prompts] for run in runs], cost, peak),
            scheduler_share=statistics.median(run.scheduler_share for run in runs),
            sampling_share=statistics.median(sampling),
            **more,
        )


def computed_prompt_tokens(job: Job, run: Run) -> int:
    """Tokens that were computed besides those of answers: an answer's last token is given out and never computed."""
    return run.computed_tokens - (job.output_tokens - len(job.prompts))


def shared_work(job: Job, run: Run, without: Run) -> SharedWork:
    """What the cache spared in a run, beside one without it."""
    spared, whole = computed_prompt_tokens(job, run), computed_prompt_tokens(job, without)
    return SharedWork(whole, spared, whole / spared, without.seconds / run.seconds)
