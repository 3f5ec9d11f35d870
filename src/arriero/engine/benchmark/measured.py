"""A job for the engine, and its run with a clock beside every step and every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Answer
from arriero.engine.benchmark.work_cost import Piece
from arriero.engine.engine import Engine
from arriero.engine.machine_peak import synchronize
from arriero.engine.runner import BLOCK_SIZE
from arriero.engine.sampling import Sampler, SamplingRow
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.work import Runner, Work
from arriero.errors import GenerationError


@dataclass(frozen=True)
class Job:
    """Requests that are handed in together.

    Attributes:
        workload: what kind it is of.
        case: its sizes, in words.
        prompts: token ids.
        new_tokens: how many tokens each answer has; none ends before.
        max_running: requests that run at once.
        prefix_cache: whether prompts that begin alike share what is computed of it.
    """

    workload: str
    case: str
    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[int]
    max_running: int
    prefix_cache: bool = True

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.new_tokens)

    def running_tokens(self, prefix_length: int = 0, block_size: int = BLOCK_SIZE) -> int:
        """Room for keys and values in which no request loses its blocks, in tokens."""
        whole = sorted(len(prompt) + new for prompt, new in zip(self.prompts, self.new_tokens, strict=True))
        return sum(tokens + prefix_length + block_size for tokens in whole[-self.max_running :])


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
        seconds: all of it.
        model_seconds: of the forward pass, until the device had done it.
        sampling_seconds: of choosing tokens from logits.
        pieces: what was computed.
        given: answers that got a token.
        prompts: whether tokens of a prompt were computed, or of one that had lost its blocks.
    """

    seconds: float
    model_seconds: float
    sampling_seconds: float
    pieces: tuple[Piece, ...]
    given: int
    prompts: bool


@dataclass(frozen=True)
class Run:
    """What became of a job.

    Attributes:
        seconds: from the first request handed in to the last token.
        first_tokens: of each request, seconds from handing in to its first token: waiting for its turn counts.
        gaps: seconds between neighbouring tokens of a request, of all requests.
        steps: in order.
        answers: token ids.
        preemptions: how often a request lost its blocks.
    """

    seconds: float
    first_tokens: list[float]
    gaps: list[float]
    steps: list[Step]
    answers: list[list[int]]
    preemptions: int

    @property
    def computed_tokens(self) -> int:
        return sum(piece.count for step in self.steps for piece in step.pieces)

    @property
    def scheduler_share(self) -> float:
        """The share of the steps' time that is neither the model's nor the sampler's: scheduling and bookkeeping."""
        whole = sum(step.seconds for step in self.steps)
        return 1.0 - sum(step.model_seconds + step.sampling_seconds for step in self.steps) / whole


@dataclass
class _Clock:
    """Seconds of the parts of the running step, and what it computes."""

    model: float = 0.0
    sampling: float = 0.0
    pieces: list[Piece] = field(default_factory=list)


class _TimedRunner:
    """A runner whose forward passes are timed; everything else is the runner's own."""

    def __init__(self, runner: Runner, clock: _Clock) -> None:
        self._runner, self._clock = runner, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, work: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        self._clock.pieces += map(Piece.of, work)
        start = time.perf_counter()
        logits = cast(Tensor, self._runner.run(work))
        synchronize(logits.device)
        self._clock.model += time.perf_counter() - start
        return logits


class _TimedSampler:
    def __init__(self, sampler: Sampler[Any], clock: _Clock) -> None:
        self._sampler, self._clock = sampler, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow[Tensor]]) -> list[int]:
        start = time.perf_counter()
        tokens = self._sampler(logits, rows)
        self._clock.sampling += time.perf_counter() - start
        return tokens


class MeasuredEngine(Engine):
    """An engine that keeps the times of its steps.

    Attributes:
        steps: in order.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, **options: Any) -> None:
        """
        Args:
            options: of `Engine`.
        """
        self._clock = _Clock()
        self.steps: list[Step] = []
        super().__init__(cast(Runner, _TimedRunner(runner, self._clock)), tokenizer, **options)
        self._sampler = cast(Sampler[Any], _TimedSampler(self._sampler, self._clock))

    def step(self) -> list[Answer]:
        """See `Engine`."""
        clock = self._clock
        clock.model, clock.sampling, clock.pieces = 0.0, 0.0, []
        start = time.perf_counter()
        answers = super().step()
        seconds = time.perf_counter() - start
        prompts = any(len(answer.token_ids) == 1 for answer in answers) or any(
            piece.count > 1 or not piece.logits for piece in clock.pieces
        )
        self.steps.append(Step(seconds, clock.model, clock.sampling, tuple(clock.pieces), len(answers), prompts))
        return answers


def run_job(runner: Runner, tokenizer: Tokenizer, job: Job, *, max_step_tokens: int = 2048) -> Run:
    """Do a job with an empty cache.

    Raises:
        GenerationError: a request that is refused, or that something went wrong with.
    """
    engine = MeasuredEngine(
        runner,
        tokenizer,
        max_running=job.max_running,
        max_step_tokens=max_step_tokens,
        prefix_cache=job.prefix_cache,
    )
    start = time.perf_counter()
    answers: list[Answer] = []
    for prompt, count in zip(job.prompts, job.new_tokens, strict=True):
        answers.append(engine.submit(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True)))
    latest: dict[Answer, float] = {}
    first: dict[Answer, float] = {}
    gaps: list[float] = []
    now = start
    while engine.unfinished:
        given = engine.step()
        now = time.perf_counter()
        for answer in given:
            if answer.finish_reason == "error":
                raise GenerationError(answer.error)
            if answer in latest:
                gaps.append(now - latest[answer])
            else:
                first[answer] = now - start
            latest[answer] = now
    return Run(
        seconds=now - start,
        first_tokens=[first[answer] for answer in answers],
        gaps=gaps,
        steps=engine.steps,
        answers=[answer.token_ids for answer in answers],
        preemptions=engine.scheduler.preemptions,
    )
