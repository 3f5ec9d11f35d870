"""How fast an engine is, of any kind of model: prompts that begin together, and answers of one length."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from arriero.engine.engine import Engine
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError

ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    """Medians of `ROUNDS` rounds, after one that is not counted.

    Attributes:
        prompt_tokens: of all prompts together.
        prompt_rate: tokens of prompts a second, until each answer has its first token.
        answer_rate: tokens of answers a second from then on; 0 for answers of one token.
    """

    prompt_tokens: int
    prompt_rate: float
    answer_rate: float


def measure(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Rates:
    """Answer the prompts again and again, each with all the tokens that the parameters allow.

    Raises:
        GenerationError: a request that is refused, or that something went wrong with.
    """
    whole = replace(params, ignore_eos=True, stop_token_ids=(), stop_strings=(), min_new_tokens=0)
    rounds = [_round(engine, prompts, whole) for _ in range(ROUNDS + 1)][1:]
    tokens = sum(map(len, prompts))
    return Rates(
        tokens,
        median(tokens / first for first, _, _ in rounds),
        median(later / rest if later else 0.0 for _, rest, later in rounds),
    )


def _round(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[float, float, int]:
    """Seconds until all have their first token, seconds from then on, and the tokens that came then."""
    salts = [secrets.token_bytes(8) for _ in prompts]  # nothing of an earlier round or of another prompt is of use
    start = time.perf_counter()
    answers = [engine.submit(prompt, params, salt=salt) for prompt, salt in zip(prompts, salts, strict=True)]
    first, early = start, 0
    while engine.unfinished:
        waiting = any(not answer.token_ids for answer in answers)
        for answer in engine.step():
            if answer.finish_reason == "error":
                raise GenerationError(answer.error)
        if waiting:
            first, early = time.perf_counter(), sum(len(answer.token_ids) for answer in answers)
    later = sum(len(answer.token_ids) for answer in answers) - early
    return first - start, time.perf_counter() - first, later
