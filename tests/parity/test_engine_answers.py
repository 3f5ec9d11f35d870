"""Several answers to a prompt, the likelihood of prompts, and what is drawn, against transformers' model."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.tokenizer import Tokenizer
from arriero.engine.draft_model import DraftModel
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import FAMILIES, NEW, PROMPTS, SHARED, expected, pair, tokenizer  # noqa: F401

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process as hf  # noqa: E402

DRAWN = SamplingParams(max_new_tokens=NEW, do_sample=True, temperature=0.8, top_p=0.9, seed=2**64 - 2)


def engine_of(model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: int = 4096, **settings: Any) -> Engine:  # noqa: F811
    if settings.pop("guesses", False):
        settings["speculation"] = Speculation(PromptLookup(longest=2, shortest=1), tokens=3, window=10**9)
    return Engine(
        TorchRunner(model, max_tokens=tokens, block_size=settings.pop("block_size", 4)), tokenizer, **settings
    )


@torch.no_grad()
def logprobs_of(theirs: Any, sequence: list[int]) -> torch.Tensor:
    """(S, V): after each token, in transformers."""
    found: torch.Tensor = theirs(torch.tensor([sequence])).logits[0].log_softmax(-1)
    return found


@functools.cache
def twins(family: str) -> tuple[LlamaForCausalLM, Any]:
    return pair(**FAMILIES[family])


@functools.cache
def drawn_alone(tokenizer: Tokenizer, prompt: tuple[int, ...], seed: int) -> tuple[list[int], str]:  # noqa: F811
    """Tokens and text of a request that has one answer and no company."""
    [alone] = engine_of(twins("llama")[0], tokenizer).generate([list(prompt)], replace(DRAWN, seed=seed))
    return alone.token_ids, alone.text


@functools.cache
def their_answer(family: str, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
    """The greedy answer of transformers, and the log-probabilities after each token of the prompt."""
    theirs = twins(family)[1]
    return expected(theirs, list(prompt)), logprobs_of(theirs, list(prompt))


CIRCUMSTANCES = [
    {},
    {"prefix_cache": False},
    {"max_step_tokens": 7, "max_running": 3},
    {"tokens": 120},  # answers lose their blocks
    {"guesses": True},
]


@pytest.mark.parametrize("settings", CIRCUMSTANCES, ids=str)
def test_each_of_several_answers_is_that_of_a_request_of_its_own(
    settings: dict[str, Any],
    tokenizer: Tokenizer,  # noqa: F811
) -> None:
    engine = engine_of(twins("llama")[0], tokenizer, **settings)
    answers = engine.generate(PROMPTS, replace(DRAWN, n=3))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        each = [answer, *answer.alternatives]
        assert len({tuple(one.token_ids) for one in each}) == 3
        for one, seed in zip(each, (2**64 - 2, 2**64 - 1, 0), strict=True):  # seeds go on from 0
            assert (one.token_ids, one.text) == drawn_alone(tokenizer, tuple(prompt), seed)
    assert engine.scheduler.preemptions > 0 or "tokens" not in settings
    greedy = engine.generate(PROMPTS[:3], SamplingParams(max_new_tokens=NEW, n=2, do_sample=False))
    for prompt, answer in zip(PROMPTS, greedy, strict=False):
        assert answer.token_ids == answer.alternatives[0].token_ids == their_answer("llama", tuple(prompt))[0]
    engine.blocks.check([])


def test_several_answers_compute_their_prompt_once(tokenizer: Tokenizer) -> None:  # noqa: F811
    model, _ = pair()
    [answer] = engine_of(model, tokenizer).generate([SHARED], replace(DRAWN, n=4))
    assert [one.cached_tokens for one in (answer, *answer.alternatives)] == [0, 56, 56, 56]


def test_the_best_are_those_of_the_highest_log_probability_per_token(tokenizer: Tokenizer) -> None:  # noqa: F811
    model, theirs = pair()
    stop = tuple(range(0, 256, 16))  # so that answers differ in length
    params = replace(DRAWN, temperature=1.5, top_p=1.0, seed=5, stop_token_ids=stop, ignore_eos=True)
    for prompt in PROMPTS:
        [all_of_them] = engine_of(model, tokenizer).generate([prompt], replace(params, n=6))
        each = [list(one.token_ids) for one in (all_of_them, *all_of_them.alternatives)]
        assert len({len(answer) for answer in each}) > 1
        means = []
        for answer in each:
            after = logprobs_of(theirs, prompt + answer)[len(prompt) - 1 : -1]
            means.append(float(after.gather(1, torch.tensor(answer)[:, None]).mean()))
        order = sorted(range(6), key=lambda i: means[i], reverse=True)
        [best] = engine_of(model, tokenizer, 160).generate([prompt], replace(params, n=2, best_of=6))
        assert [one.token_ids for one in (best, *best.alternatives)] == [each[i] for i in order[:2]]
        assert best.logprobs == (), "they were not asked for"


def check_prompt(found: tuple[TokenLogprobs | None, ...], prompt: list[int], wanted: torch.Tensor, top: int) -> None:
    assert len(found) == len(prompt)
    assert found[0] is None
    for place in range(1, len(prompt)):
        one, row = found[place], wanted[place - 1]
        assert one is not None
        assert one.logprob == pytest.approx(float(row[prompt[place]]), rel=1e-5)
        assert [index for index, _ in one.top] == row.topk(top).indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(row.topk(top).values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "scores"),
    [
        *(("llama", 5), ("mistral, window", 10**6), ("dynamic", 10**6)),
        *(
            pytest.param(*other, marks=pytest.mark.peers)
            for other in (("llama", 10**6), ("mistral, window", 5), ("dynamic", 5))
        ),
    ],
)
@pytest.mark.parametrize("settings", CIRCUMSTANCES, ids=str)
def test_the_likelihood_of_prompts_is_that_of_one_forward_pass(
    settings: dict[str, Any],
    family: str,
    scores: int,
    tokenizer: Tokenizer,  # noqa: F811
) -> None:
    engine = engine_of(twins(family)[0], tokenizer, **settings)
    engine.scheduler.max_step_scores = scores
    # twice, so that the cache knows all of it; among others that take it from there
    for _ in range(2):
        params = [SamplingParams(max_new_tokens=NEW, prompt_logprobs=top, n=2, do_sample=False) for top in (0, 3)]
        plain = SamplingParams(max_new_tokens=NEW)
        answers = engine.generate(
            [*PROMPTS, *PROMPTS], [*[params[i % 2] for i in range(len(PROMPTS))], *[plain] * len(PROMPTS)]
        )
        for i, (prompt, answer) in enumerate(zip([*PROMPTS, *PROMPTS], answers, strict=True)):
            wanted, after = their_answer(family, tuple(prompt))
            assert answer.token_ids == wanted
            if i < len(PROMPTS):
                check_prompt(answer.prompt_logprobs, prompt, after, 3 * (i % 2))
                assert answer.cached_tokens == 0
                assert answer.alternatives[0].prompt_logprobs == ()
            else:
                assert answer.prompt_logprobs == ()
    assert engine.scheduler.preemptions > 0 or "tokens" not in settings
    engine.blocks.check([])


def test_a_step_scores_no_more_of_prompts_than_memory_is_given_for(tokenizer: Tokenizer) -> None:  # noqa: F811
    model, _ = pair()
    engine = engine_of(model, tokenizer)
    engine.scheduler.max_step_scores = 6
    rows: list[int] = []
    run = engine.runner.run

    def counted(work: Any) -> torch.Tensor:
        logits = run(work)
        rows.append(len(logits))
        return logits

    engine.runner.run = counted  # type: ignore[method-assign]
    engine.generate([SHARED] * 3, SamplingParams(max_new_tokens=2, prompt_logprobs=0))
    assert max(rows) <= 6 + 3


@pytest.mark.parametrize("guess", ["no", "lookup", "draft"])
def test_the_drawn_distribution_is_that_of_transformers(guess: str, tokenizer: Tokenizer) -> None:  # noqa: F811
    """Chi-square over all answers of three tokens, where those after the first are checked guesses."""
    model, theirs = pair()
    drafter = {"no": None, "lookup": PromptLookup(longest=1, shortest=1)}.get(
        guess,
        DraftModel(TorchRunner(model, max_tokens=4096), 256),  # the likeliest tokens, of which some are drawn
    )
    speculation = Speculation(drafter, tokens=2, window=10**9) if drafter is not None else None
    engine = engine_of(model, tokenizer, max_running=64, speculation=speculation)
    # the model's own likeliest tokens: what is drawn is often found in it, and sometimes goes on as it does there
    own = theirs.generate(torch.tensor([[9]]), max_new_tokens=99, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompt, draws = [*own[0].tolist(), 9], 1024
    cases: list[tuple[dict[str, Any], list[Any]]] = [
        ({"temperature": 1.7, "top_k": 5}, [hf.TemperatureLogitsWarper(1.7), hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
        ({"temperature": 0.8, "min_p": 0.1}, [hf.TemperatureLogitsWarper(0.8), hf.MinPLogitsWarper(0.1)]),
    ]
    for number, (settings, warpers) in enumerate(cases):
        answers = []
        for first in range(0, draws, 128):
            params = SamplingParams(
                max_new_tokens=3, do_sample=True, ignore_eos=True, n=128, seed=number * draws + first, **settings
            )
            [answer] = engine.generate([prompt], params)
            answers += [tuple(one.token_ids) for one in (answer, *answer.alternatives)]
        probabilities = {(): 1.0}
        for _ in range(3):
            longer: dict[tuple[int, ...], float] = {}
            with torch.no_grad():
                scores = theirs(torch.tensor([[*prompt, *begun] for begun in probabilities])).logits[:, -1]
            for warper in warpers:
                scores = warper(None, scores)
            for (begun, chance), row in zip(probabilities.items(), scores.softmax(-1), strict=True):
                longer |= {(*begun, i): chance * float(row[i]) for i in row.nonzero().flatten().tolist()}
            probabilities = longer
        assert set(answers) <= set(probabilities)
        likely = [answer for answer, chance in probabilities.items() if chance * draws >= 5]
        assert len(likely) > 8
        observed = [answers.count(answer) for answer in likely]
        wanted = [probabilities[answer] * draws for answer in likely]
        if draws - sum(wanted) >= 5:  # all others together
            observed.append(draws - sum(observed))
            wanted.append(draws - sum(wanted))
        statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
        degrees = len(wanted) - 1
        # The 99.99 % point of chi-square (Wilson and Hilferty's approximation); the seeds are fixed anyway.
        limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
        assert statistic < limit, (settings, statistic, limit)
    assert speculation is None or 0 < speculation.counters.accepted < speculation.counters.proposed


def test_pieces_of_several_answers_are_refused_where_there_is_one_stream(tokenizer: Tokenizer) -> None:  # noqa: F811
    engine = engine_of(pair()[0], tokenizer)
    several = SamplingParams(max_new_tokens=2, n=2)
    with pytest.raises(GenerationError, match="2 answers are asked for where only one can be given"):
        engine.stream([1], several)
    with pytest.raises(GenerationError, match="prompt 0: text can come piece by piece of one answer only"):
        engine.generate([[1]], several, on_text=lambda *_: None)
    assert not engine.unfinished
