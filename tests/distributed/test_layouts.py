"""Every layout trains as one process does: loss, gradient norm, gradients, weights, evaluation.

The programs in `layout_grid.py` compute everything, each number of processes started once; the tests read what they found.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from arriero.config.compatibility import check as check_options
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from layout_grid import OVERFLOWING, WORLDS, Cell, grid, run_all, variations
from layout_runs import read_lines

LIMIT = 1e-5
# Loss, norm and gradients of half precision: some roundings, of 2**-9 in bfloat16 and 2**-12 in float16.
HALF_LIMITS = {
    "bf16": {"loss": 2**-8, "eval_loss": 2**-8, "norm": 2**-5, "gradient": 2**-4},
    "fp16": {"loss": 2**-11, "eval_loss": 2**-11, "norm": 2**-8, "gradient": 2**-7},
}
Results = dict[str, dict[str, Any]]


def results_of(part: str, temporary: pytest.TempPathFactory) -> Results:
    """Run a part once for all test processes of this session."""
    folder = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / f"{part}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / part / "results.jsonl"
        if not path.exists():
            run_all(folder / part, part)
        return {line["name"]: line for line in read_lines(path)}


@pytest.fixture(scope="session")
def some(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("some", tmp_path_factory)


@pytest.fixture(scope="session")
def every_grid(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("every grid", tmp_path_factory)


@pytest.fixture(scope="session")
def every_variation(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("every variation", tmp_path_factory)


def result_of(cell: Cell, results: Results) -> dict[str, Any]:
    found = results.get(cell.name)
    if found is None or "error" in found:
        errors = [line["error"] for line in results.values() if "error" in line]
        pytest.fail(f"{cell.name}: {found['error'] if found else 'no result'}\n" + "\n".join(errors)[-3000:])
    return found


def check(cell: Cell, results: Results) -> None:
    found = result_of(cell, results)
    assert found["agree"], "the processes tell different numbers"
    for exact in ("tokens", "skipped"):
        assert found[exact][0] == found[exact][1], exact
    if cell.what[:4] in HALF_LIMITS:
        limits = HALF_LIMITS[cell.what[:4]]
    else:
        limits = dict.fromkeys(("loss", "eval_loss", "norm", "gradient", "worst_gradient", "weight"), LIMIT)
        assert found["accuracy"][0] == found["accuracy"][1]
    if cell.what.startswith("biases"):  # that of the keys has no gradient but rounding, which AdamW makes a step of
        limits.pop("weight")
    too_far = {key: found[key] for key, limit in limits.items() if not found[key] <= limit}
    assert not too_far, f"relative differences above {limits}"


def named(cells: Callable[[int], list[Cell]]) -> list[Any]:
    return [pytest.param(cell, id=cell.name) for world in WORLDS for cell in cells(world)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cell", named(grid))
def test_a_layout_is_one_process(cell: Cell, some: Results) -> None:
    """Three steps with clipping, a warm-up and a smaller last step; `test_every_run_on_every_layout` has all cells and five."""
    check(cell, some)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cell", named(variations))
def test_variations(cell: Cell, some: Results) -> None:
    """On the layouts where they take a path of their own; `test_every_variation` has all."""
    check(cell, some)


@pytest.mark.peers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", named(partial(grid, every=True)))
def test_every_run_on_every_layout(cell: Cell, every_grid: Results) -> None:
    check(cell, every_grid)


@pytest.mark.peers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", named(partial(variations, every=True)))
def test_every_variation(cell: Cell, every_variation: Results) -> None:
    check(cell, every_variation)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", OVERFLOWING)
def test_an_overflow_in_one_process_is_skipped_in_all(layout: str, some: Results) -> None:
    found = some[f"{layout}: overflow"]["told"]
    scale = PrecisionOptions(fp16=True).scale_loss
    # skipped, weights moved, loss scale after it
    assert found == [[[False, True, scale], [True, False, scale / 2], [False, True, scale / 2]]] * len(found)
    assert len(found) > 1


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_compiled_layers_have_no_backward_pass_in_two_parts(schedule: str) -> None:
    parallel = ParallelOptions(pipeline_parallel_degree=2, pipeline_schedule=schedule)
    with pytest.raises(ConfigError, match=f"--torch_compile and --pipeline_schedule {schedule}"):
        check_options([parallel, PrecisionOptions(torch_compile=True)])
    check_options([parallel, PrecisionOptions()])
    check_options([ParallelOptions(pipeline_parallel_degree=2), PrecisionOptions(torch_compile=True)])
