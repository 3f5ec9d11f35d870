"""Learning rates step by step: against transformers' schedulers, the seed's formula, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from arriero.config.optimization import DECAY_SHAPES, SCHEDULES, OptimizationOptions
from arriero.config.pretraining import PretrainOptimizationOptions
from arriero.errors import ConfigError
from arriero.training.schedule import Schedule

TOTAL, PEAK = 41, 3e-4


def steps_of(scheduler: Callable[..., Any], **arguments: Any) -> list[float]:
    """The rates that one of transformers' schedulers gives."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = scheduler(optimizer, **arguments)
    rates = []
    for _ in range(TOTAL):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def ours(*arguments: Any, **more: Any) -> list[float]:
    schedule = Schedule(*arguments, **more)
    return [schedule(step) for step in range(TOTAL)]


@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_inverse_sqrt_is_transformers(warmup: int) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    theirs = steps_of(optimization.get_inverse_sqrt_schedule, num_warmup_steps=warmup)
    assert ours("inverse_sqrt", PEAK, 0.0, warmup, TOTAL) == pytest.approx(theirs, rel=1e-12)


def test_inverse_sqrt_is_fairseqs_closed_form() -> None:
    schedule = Schedule("inverse_sqrt", 1.0, 0.1, 100, 200)
    assert [schedule(s) for s in (0, 50, 100, 400, 2500)] == [0.0, 0.5, 1.0, 0.5, 0.2]
    assert schedule(10**6) == 0.1, "the floor holds, long after decay_steps"


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("warmup", [0, 7])
def test_polynomial_is_transformers(warmup: int, power: float) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    theirs = steps_of(
        optimization.get_polynomial_decay_schedule_with_warmup,
        num_warmup_steps=warmup,
        num_training_steps=31,
        lr_end=1e-5,
        power=power,
    )
    assert ours("polynomial", PEAK, 1e-5, warmup, 31, power=power) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("shape", DECAY_SHAPES)
@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("floor", [0.0, 3e-5])
def test_wsd_is_transformers(warmup: int, shape: str, floor: float) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    theirs = steps_of(
        optimization.get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=10,
        num_training_steps=40,
        decay_type=shape,
        min_lr_ratio=floor / PEAK,
    )
    mine = ours("wsd", PEAK, floor, warmup, 40, decay_ratio=0.25, decay_shape=shape)
    # with a floor, transformers' warm-up begins there; the seed's and ours begins at 0
    first = warmup if floor else 0
    assert mine[first:] == pytest.approx(theirs[first:], rel=1e-12, abs=1e-18)
    assert mine[:warmup] == pytest.approx([PEAK * step / 6 for step in range(warmup)])
    assert mine[warmup:31] == [PEAK] * (31 - warmup), "stable until the last quarter"


def test_wsd_by_hand() -> None:
    schedule = Schedule("wsd", 1.0, 0.0, 10, 100, decay_ratio=0.1)
    assert [schedule(s) for s in (5, 10, 90, 100, 1000)] == [0.5, 1.0, 1.0, 0.0, 0.0]
    assert schedule(94) == pytest.approx(1 - math.sqrt(0.4))  # Hägele et al., equation 1
    crowded = Schedule("wsd", 1.0, 0.0, 60, 100, decay_ratio=0.8, decay_shape="linear")
    assert [crowded(s) for s in (30, 60, 80)] == [0.5, 1.0, 0.5], "the decay never begins within the warm-up"


def test_cosine_and_linear_are_the_seeds() -> None:
    """PaddleNLP's: min + 0.5 (1 + cos(pi (t - w) / (D - w))) (max - min); linear with 1 - ratio; after D: min."""
    low, high, w, d = 1e-5, 1e-4, 5, 30
    for kind, remaining in (("cosine", lambda r: 0.5 * (1 + math.cos(math.pi * r))), ("linear", lambda r: 1 - r)):
        schedule = Schedule(kind, high, low, w, d)
        for step in range(45):
            if step < w:
                expected = high * step / w
            elif step > d:
                expected = low
            else:
                expected = low + remaining((step - w) / (d - w)) * (high - low)
            assert schedule(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "decay"), [(0, 1), (0, 20), (20, 20), (30, 20), (5, 41)])
def test_every_schedule_stays_between_zero_floor_and_peak(kind: str, warmup: int, decay: int) -> None:
    rates = ours(kind, PEAK, 1e-5, warmup, decay)
    assert all(0.0 <= rate <= PEAK * (1 + 1e-12) for rate in rates)
    assert all(rate >= 1e-5 * (1 - 1e-12) for rate in rates[warmup:])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_from_options() -> None:
    options = PretrainOptimizationOptions(
        learning_rate=1e-3, warmup_ratio=0.05, lr_scheduler_type="warmup_stable_decay", wsd_decay_shape="linear"
    )
    assert options.lr_scheduler_type == "wsd"
    assert Schedule.from_options(options, 90) == Schedule("wsd", 1e-3, 1e-5, 5, 90, 0.2, "linear", 1.0)
    options = OptimizationOptions(warmup_steps=3, warmup_ratio=0.5, decay_steps=7, lr_power=2.0)
    assert Schedule.from_options(options, 90) == Schedule("linear", 5e-5, 0.0, 3, 7, power=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "triangle"}, "--lr_scheduler_type is 'triangle'"),
        ({"wsd_decay_ratio": 0.0}, "--wsd_decay_ratio is 0"),
        ({"wsd_decay_ratio": 1.5}, "--wsd_decay_ratio is 1.5"),
        ({"wsd_decay_shape": "steep"}, "--wsd_decay_shape is 'steep'"),
        ({"lr_power": 0.0}, "--lr_power is 0"),
        ({"optim": "adafactor"}, "--optim is 'adafactor'"),
        ({"muon_momentum": 1.0}, "--muon_momentum is 1"),
        (
            {"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "wsd_decay_ratio": 0.6},
            "--warmup_ratio 0.5 and --wsd_decay_ratio 0.6",
        ),
        (
            {"lr_scheduler_type": "wsd", "warmup_steps": 50, "wsd_decay_ratio": 0.6, "max_steps": 100},
            "--warmup_steps 50 and the 60 steps of --wsd_decay_ratio 0.6 are more than the 100 steps",
        ),
    ],
)
def test_options_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OptimizationOptions(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_warm_up_in_steps_that_ends_after_the_decay_begins_is_refused_once_the_steps_are_known() -> None:
    options = OptimizationOptions(lr_scheduler_type="wsd", warmup_steps=50, wsd_decay_ratio=0.5)
    assert Schedule.from_options(options, 100)(50) == options.learning_rate
    assert Schedule.from_options(options, 101).warmup_steps == 50
    with pytest.raises(
        ConfigError, match=r"--warmup_steps 50 and the 49 steps of --wsd_decay_ratio 0\.5 are more than"
    ):
        Schedule.from_options(options, 98)


def test_shapes_are_checked_without_the_command_line_too() -> None:
    with pytest.raises(ConfigError, match="wsd_decay_shape is 'steep'"):
        Schedule("wsd", 1.0, 0.0, 0, 1, decay_shape="steep")
