"""Training with ring attention is training in one process: loss, gradient norm, gradients, weights, evaluation.

The programs in `ring_layouts.py` compute everything, each number of processes started once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import ring_layouts
from layout_grid import WORLDS, Cell
from layout_runs import read_lines, run_ranks
from test_layouts import Results, check

PROGRAM = Path(ring_layouts.__file__).resolve()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ring")
    run_ranks(1, PROGRAM, "reference", str(folder), timeout=600)
    for world in WORLDS:
        run_ranks(world, PROGRAM, "ranks", str(folder), timeout=600)
    return {line["name"]: line for line in read_lines(folder / "results.jsonl")}


@pytest.mark.peers
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "cell", [cell for world in WORLDS for cell in ring_layouts.cells_of("grid", world)], ids=lambda c: c.name
)
def test_a_ring_is_one_process(cell: Cell, results: Results) -> None:
    check(cell, results)
