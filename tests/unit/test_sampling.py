"""Sampling: ranges, seeds, and rows that do not disturb each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arriero.engine.sampling import BROKEN, Sampler, SamplingRow
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError


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


def rows_for(cases: list[SamplingParams], size: int = 50) -> list[SamplingRow]:
    return [SamplingRow.start(params, [1, 2], [3], size) for params in cases]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    cases = [
        SamplingParams(do_sample=True, seed=1),
        SamplingParams(),
        SamplingParams(do_sample=True, seed=1, top_p=0.8),
        SamplingParams(do_sample=True, seed=2, top_k=5, repetition_penalty=1.3),
        SamplingParams(do_sample=True, seed=2, min_p=0.1, min_new_tokens=5),
    ]
    steps = torch.randn(12, len(cases), 50, generator=torch.Generator().manual_seed(0)) * 2
    together = rows_for(cases)
    batched = torch.stack([Sampler()(step, together) for step in steps], dim=1)
    for i in range(len(cases)):
        alone = rows_for([cases[i]])
        assert [int(Sampler()(step[i : i + 1], alone)) for step in steps] == batched[i].tolist()
    order = [3, 0, 4, 2, 1]
    shuffled = rows_for([cases[i] for i in order])
    again = torch.stack([Sampler()(step[order], shuffled) for step in steps], dim=1)
    assert torch.equal(again, batched[order])


def test_without_a_seed_answers_differ() -> None:
    logits = torch.zeros(1, 50)
    params = SamplingParams(do_sample=True)
    draws = [[int(Sampler()(logits, row)) for _ in range(20)] for row in (rows_for([params]), rows_for([params]))]
    assert draws[0] != draws[1]


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(1, 50)
    assert int(Sampler()(logits, rows_for([SamplingParams(do_sample=True, temperature=0.0)]))) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 50
    row = rows_for([SamplingParams(do_sample=True, temperature=temperature, seed=0, top_p=0.9, min_p=0.01)])
    token = int(Sampler()(logits, row))
    assert 0 <= token < 50
    if temperature < 1:
        assert token == int(logits.argmax())


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), -math.inf)
    logits[0, 17] = 0.0
    row = rows_for([SamplingParams(do_sample=True, seed=0)])
    assert {int(Sampler()(logits, row)) for _ in range(50)} == {17}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_reported(bad: float) -> None:
    logits = torch.zeros(4, 50)
    logits[1, 7] = logits[3, 7] = bad
    logits[:, 9] += 1.0
    rows = rows_for([SamplingParams(), SamplingParams(), SamplingParams(), SamplingParams(do_sample=True)])
    assert Sampler()(logits, rows).tolist() == [9, BROKEN, 9, BROKEN]
    assert [row.generated for row in rows] == [1, 0, 1, 0], "the others go on"


def test_logits_are_left_alone() -> None:
    logits = torch.randn(1, 50)
    before = logits.clone()
    row = rows_for([SamplingParams(do_sample=True, top_k=3, repetition_penalty=2.0, min_new_tokens=9, seed=0)])
    Sampler()(logits, row)
    assert torch.equal(logits, before)
