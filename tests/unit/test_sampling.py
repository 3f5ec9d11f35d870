"""Sampling: ranges, seeds, and rows that do not disturb each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.engine.numpy_sampling import NumpySampler
from arriero.engine.sampling import BROKEN, Sampler, SamplingRow, sampler_of
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.torch_sampling import TorchSampler
from arriero.engine.work import Library
from arriero.errors import GenerationError


@pytest.fixture(params=["torch", "numpy"])
def library(request: pytest.FixtureRequest) -> Library:
    """Whose arrays logits are; all tests are the same for both."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def sampler(library: Library) -> Sampler[Any]:
    return sampler_of(library, "cpu")


def draw(sampler: Sampler[Any], logits: Tensor, rows: list[SamplingRow[Any]]) -> list[int]:
    """The next tokens, from logits in the sampler's own library."""
    return sampler(logits if isinstance(sampler, TorchSampler) else logits.numpy(), rows)


def test_the_sampler_is_that_of_the_library(sampler: Sampler[Any], library: Library) -> None:
    assert type(sampler) is {"torch": TorchSampler, "numpy": NumpySampler}[library]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("stop_token_ids", (-1,)),
        ("stop_strings", ("",)),
        ("stop_strings", ("x",) * 65),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=name):
        SamplingParams(**{name: value})


def rows_for(sampler: Sampler[Any], cases: list[SamplingParams], size: int = 50) -> list[SamplingRow[Any]]:
    return [sampler.start(params, [1, 2], [3], size) for params in cases]


CASES = [
    SamplingParams(do_sample=True, seed=1),
    SamplingParams(),
    SamplingParams(do_sample=True, seed=1, top_p=0.8),
    SamplingParams(do_sample=True, seed=2, top_k=5, repetition_penalty=1.3),
    SamplingParams(do_sample=True, seed=2, min_p=0.1, min_new_tokens=5),
]


def test_a_row_draws_the_same_alone_and_in_any_batch(sampler: Sampler[Any]) -> None:
    steps = torch.randn(12, len(CASES), 50, generator=torch.Generator().manual_seed(0)) * 2
    together = rows_for(sampler, CASES)
    batched = [draw(sampler, step, together) for step in steps]
    for i, case in enumerate(CASES):
        alone = rows_for(sampler, [case])
        assert [draw(sampler, step[i : i + 1], alone)[0] for step in steps] == [tokens[i] for tokens in batched]
    order = [3, 0, 4, 2, 1]
    shuffled = rows_for(sampler, [CASES[i] for i in order])
    again = [draw(sampler, step[order], shuffled) for step in steps]
    assert again == [[tokens[i] for i in order] for tokens in batched]


def test_the_random_numbers_are_those_of_numpy(sampler: Sampler[Any]) -> None:
    """A seed's draws are a promise: those of the generator that NumPy keeps as it is."""
    for seed in (0, 5, 2**64 - 1):
        (row,) = rows_for(sampler, [SamplingParams(do_sample=True, seed=seed)])
        expected = np.random.Generator(np.random.PCG64(seed)).random(100)
        assert [row.uniform() for _ in range(100)] == expected.tolist()


def test_without_a_seed_answers_differ(sampler: Sampler[Any]) -> None:
    logits = torch.zeros(1, 50)
    params = SamplingParams(do_sample=True)
    draws = [
        [draw(sampler, logits, row) for _ in range(20)]
        for row in (rows_for(sampler, [params]), rows_for(sampler, [params]))
    ]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, False),
        ({"seed": 3}, False),
        ({"temperature": 1.0}, True),
        ({"temperature": 0.8, "seed": 3}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"n": 3}, True),
        ({"best_of": 3}, True),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, False),
        ({"temperature": 0.0, "top_p": 0.9, "n": 3}, False),
        ({"temperature": 0.8, "do_sample": False, "n": 3}, False),
        ({"do_sample": True}, True),
    ],
)
def test_what_asks_for_draws(settings: dict[str, Any], drawn: bool) -> None:
    params = SamplingParams(**settings)
    assert params.greedy is not drawn
    assert all(params.of_candidate(i).greedy is not drawn for i in range(params.candidates))


def test_temperature_zero_is_greedy(sampler: Sampler[Any]) -> None:
    logits = torch.randn(1, 50)
    row = rows_for(sampler, [SamplingParams(do_sample=True, temperature=0.0)])
    assert draw(sampler, logits, row) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(sampler: Sampler[Any], temperature: float) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 50
    case = SamplingParams(do_sample=True, temperature=temperature, seed=0, top_p=0.9, min_p=0.01)
    (token,) = draw(sampler, logits, rows_for(sampler, [case]))
    assert 0 <= token < 50
    if temperature < 1:
        assert token == int(logits.argmax())


def test_impossible_tokens_are_never_drawn(sampler: Sampler[Any]) -> None:
    logits = torch.full((1, 50), -math.inf)
    logits[0, 17] = 0.0
    row = rows_for(sampler, [SamplingParams(do_sample=True, seed=0)])
    assert {draw(sampler, logits, row)[0] for _ in range(50)} == {17}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_reported(sampler: Sampler[Any], bad: float) -> None:
    logits = torch.zeros(4, 50)
    logits[1, 7] = logits[3, 7] = bad
    logits[:, 9] += 1.0
    cases = [SamplingParams(), SamplingParams(), SamplingParams(), SamplingParams(do_sample=True)]
    rows = rows_for(sampler, cases)
    assert draw(sampler, logits, rows) == [9, BROKEN, 9, BROKEN]
    assert [len(row.drawn) for row in rows] == [1, 0, 1, 0], "the others go on"


def test_logits_are_left_alone(sampler: Sampler[Any]) -> None:
    logits = torch.randn(1, 50)
    before = logits.clone()
    settings: dict[str, Any] = {"do_sample": True, "seed": 0, "min_new_tokens": 9}
    for more in ({}, {"top_k": 3, "repetition_penalty": 2.0}, {"logit_bias": {4: 1.0}}, {"presence_penalty": 1.0}):
        row = rows_for(sampler, [SamplingParams(**settings, **more)])
        for _ in range(3):
            draw(sampler, logits, row)
            assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [50, 3000])
def test_both_libraries_choose_the_same(size: int) -> None:
    """In all ways of choosing, step after step: each draw depends on those before it."""
    cases = [
        SamplingParams(**settings, seed=seed, do_sample=drawn)
        for seed, drawn in ((0, False), (1, True), (2, True))
        for settings in (
            {},
            {"temperature": 0.3},
            {"temperature": 2.5, "top_k": 7},
            {"top_p": 0.7},
            {"top_p": 0.9999, "temperature": 3.0},  # of 3,000 tokens, more than are sorted at first
            {"min_p": 0.05, "repetition_penalty": 1.4},
            {"frequency_penalty": 0.6, "presence_penalty": -0.3, "min_new_tokens": 20},
            {"logit_bias": {4: 3.0, 11: -100.0}, "top_k": 30, "top_p": 0.9},
        )
    ]
    steps = torch.randn(40, len(cases), size, generator=torch.Generator().manual_seed(4)) * 3
    chosen = []
    for library in ("torch", "numpy"):
        sampler = sampler_of(library, "cpu")  # type: ignore[arg-type]
        rows = rows_for(sampler, cases, size)
        chosen.append([draw(sampler, step, rows) for step in steps])
    assert chosen[0] == chosen[1]
    assert len({tuple(step[i] for step in chosen[0]) for i in range(len(cases))}) > len(cases) // 2
