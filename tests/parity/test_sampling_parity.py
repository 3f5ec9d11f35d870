"""Each sampling processor against transformers' of the same name, and the whole sampler against their chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.engine import numpy_sampling, torch_sampling
from arriero.engine.sampling import Sampler, sampler_of
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.torch_sampling import TorchSampler
from arriero.engine.work import Library
from arriero.errors import GenerationError

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process as hf  # noqa: E402

VOCABULARY = 2000  # more than sampling.NUCLEUS_CANDIDATES, so that both ways of top-p run
LIBRARIES: tuple[Library, Library] = ("torch", "numpy")
Processor = Callable[..., Tensor]


@pytest.fixture(params=LIBRARIES)
def sampler(request: pytest.FixtureRequest) -> Sampler[Any]:
    return sampler_of(request.param, "cpu")


def native(sampler: Sampler[Any], logits: Tensor) -> Any:
    """Logits as arrays of the sampler's library."""
    return logits if isinstance(sampler, TorchSampler) else logits.numpy()


def logits(rows: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def column(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None]


@pytest.fixture(params=LIBRARIES)
def processed(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """A processor by its name, with a value for each row; NumPy's take a row at a time."""

    def by_torch(name: str, scores: Tensor, values: list[Any], *more: Tensor) -> Tensor:
        of_rows = torch.tensor(values) if name == "top_k" else column(values)
        return getattr(torch_sampling, name)(scores, *more, of_rows)  # type: ignore[no-any-return]

    def by_numpy(name: str, scores: Tensor, values: list[Any], *more: Tensor) -> Tensor:
        process = getattr(numpy_sampling, name)
        others = [[tensor[row].numpy() for tensor in more] for row in range(len(scores))]
        rows = [process(scores[row].numpy(), *others[row], value) for row, value in enumerate(values)]
        assert {row.dtype for row in rows} == {np.dtype(np.float32)}
        return torch.from_numpy(np.stack(rows))

    return by_torch if request.param == "torch" else by_numpy


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.7])
def test_repetition_penalty(processed: Processor, penalty: float) -> None:
    scores = logits(3)
    history = torch.randint(0, VOCABULARY, (3, 50), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, history, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(history, scores.clone())
    ours = processed("repetition_penalty", scores, [penalty] * 3, seen)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_top_k_with_a_value_a_row(processed: Processor) -> None:
    values = [1, 7, VOCABULARY + 5]
    scores = logits(3)
    ours = processed("top_k", scores, values)
    for row, k in enumerate(values):
        expected = hf.TopKLogitsWarper(k)(None, scores[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_top_p_with_a_value_a_row(processed: Processor, scale: float) -> None:
    values = [1e-6, 0.3, 0.9, 0.999]
    scores = logits(4, scale)
    ours = processed("top_p", scores, values)
    for row, p in enumerate(values):
        expected = hf.TopPLogitsWarper(p)(None, scores[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected), p


def test_min_p_with_a_value_a_row(processed: Processor) -> None:
    values = [1e-4, 0.05, 0.5, 1.0]
    scores = logits(4)
    ours = processed("min_p", scores, values)
    for row, p in enumerate(values):
        expected = hf.MinPLogitsWarper(p)(None, scores[row : row + 1].clone())
        assert torch.equal(ours[row : row + 1], expected), p


def transformers_scores(params: SamplingParams, history: Tensor, prompt: int, eos: list[int], scores: Tensor) -> Tensor:
    """What transformers' generate would draw from."""
    chain = []
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(hf.MinNewTokensLengthLogitsProcessor(prompt, params.min_new_tokens, eos))
    chain.append(hf.TemperatureLogitsWarper(params.divisor))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    for processor in chain:
        scores = processor(history, scores)
    return scores


def test_the_sampled_distribution(sampler: Sampler[Any]) -> None:
    """20,000 draws of each row of a mixed batch against the probabilities that transformers would draw from."""
    size, copies, steps, eos = 40, 200, 100, [3, 5]
    prompt = [1, 2, 3, 4]
    cases = [
        SamplingParams(do_sample=True),
        SamplingParams(do_sample=True, temperature=0.5),
        SamplingParams(do_sample=True, temperature=1.3, top_k=6),
        SamplingParams(do_sample=True, top_p=0.6),
        SamplingParams(do_sample=True, min_p=0.2),
        SamplingParams(do_sample=True, repetition_penalty=1.8),
        SamplingParams(do_sample=True, min_new_tokens=200),
        SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ]
    scores = torch.randn(len(cases), size, generator=torch.Generator().manual_seed(3)) * 1.5
    # Many rows of each kind, in turn, with a seed each.
    rows = [
        sampler.start(replace(params, seed=copy * len(cases) + i), prompt, eos, size)
        for copy in range(copies)
        for i, params in enumerate(cases)
    ]
    draws = copies * steps
    counts = torch.zeros(len(cases), size)
    for _ in range(steps):
        for row in rows:  # every draw is a first one
            row.drawn.clear()
            row.release()
        chosen = torch.tensor(sampler(native(sampler, scores.repeat(copies, 1)), rows)).view(copies, len(cases))
        for i in range(len(cases)):
            counts[i] += torch.bincount(chosen[:, i], minlength=size)
    for i, params in enumerate(cases):
        expected = transformers_scores(params, torch.tensor([prompt]), len(prompt), eos, scores[i : i + 1].clone())
        probabilities = expected.softmax(-1)[0]
        assert counts[i][probabilities == 0].sum() == 0
        likely = probabilities * draws >= 5
        observed, wanted = counts[i][likely], probabilities[likely] * draws
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        degrees = int(likely.sum()) - 1
        # The 99.99 % point of chi-square (Wilson and Hilferty's approximation); the seeds are fixed anyway.
        limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
        assert statistic < limit, (params, statistic, limit)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_scores(sampler: Sampler[Any], penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, min_new_tokens=2)
    scores, prompt, eos = logits(1), [4, 5, 6], [9]
    row = sampler.start(params, prompt, eos, VOCABULARY)
    history = list(prompt)
    for step in range(4):
        now = scores.clone()
        now[0, 9] = 100.0  # the model wants to end
        chain = [hf.MinNewTokensLengthLogitsProcessor(3, 2, eos)]
        if penalty != 1.0:
            chain.insert(0, hf.RepetitionPenaltyLogitsProcessor(penalty))
        expected = now.clone()
        for processor in chain:
            expected = processor(torch.tensor([history]), expected)
        (token,) = sampler(native(sampler, now), [row])
        assert token == int(expected.argmax())
        assert (token == 9) == (step >= 2)
        history.append(token)


def test_penalties_and_bias_of_the_openai_api(sampler: Sampler[Any]) -> None:
    """Its formula, token by token: mu[j] + bias[j] - c[j] * frequency - (c[j] > 0) * presence."""
    cases = [(0.5, 0.0, {}), (0.0, 0.02, {}), (-0.7, 0.3, {4: 5.0, 9: -100.0}), (0.0, 0.0, {7: 2.5})]
    rows = [
        sampler.start(
            SamplingParams(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias), [1], [], VOCABULARY
        )
        for frequency, presence, bias in cases
    ]
    answers: list[list[int]] = [[] for _ in cases]
    for step in range(12):
        scores = logits(1, 0.3, seed=step % 3).expand(len(cases), -1)  # alike again and again, so that penalties decide
        chosen = sampler(native(sampler, scores), rows)
        for (frequency, presence, bias), answer, token in zip(cases, answers, chosen, strict=True):
            wanted = scores[0].clone()
            for j in range(VOCABULARY):
                count = answer.count(j)
                wanted[j] += bias.get(j, 0.0) - count * frequency - (count > 0) * presence
            assert token == int(wanted.argmax())
            answer.append(token)
    assert len({tuple(answer) for answer in answers}) == len(cases)


def test_a_bias_for_no_token_is_refused(sampler: Sampler[Any]) -> None:
    with pytest.raises(GenerationError, match="logit_bias names token id 2000 and the model has ids 0 to 1999"):
        sampler.start(SamplingParams(logit_bias={2000: 1.0}), [1], [], VOCABULARY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1: it must be from -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"logit_bias": {1: math.inf}}, "logit_bias is .* finite numbers"),
        ({"logprobs": 101}, "logprobs is 101: it must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_values_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        SamplingParams(**values)


def test_log_probabilities(sampler: Sampler[Any]) -> None:
    scores = logits(3)
    found = sampler.logprobs(native(sampler, scores), [5, 6, 7], [0, 2, 5])
    expected = torch.log_softmax(scores, dim=-1)
    for row, (token, count) in enumerate(zip([5, 6, 7], [0, 2, 5], strict=True)):
        assert found[row].logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        values, ids = expected[row].sort(descending=True)
        assert [index for index, _ in found[row].top] == ids[:count].tolist()
        assert [value for _, value in found[row].top] == pytest.approx(values[:count].tolist(), abs=1e-5)
    none = sampler.logprobs(native(sampler, scores), [5, 6, 7], [0, 0, 0])
    assert [one.top for one in none] == [(), (), ()]
