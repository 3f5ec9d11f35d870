"""Two processes train in 8-bit floats as one does: where they hold whole matrices but for rounding, else within 8 bits'."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fp8_layouts
from layout_runs import make_trainer, read_lines, run_ranks

from arriero.parallel.processes import Processes

# Parts of a matrix, of a row or of a micro-batch (which a pipeline pads) have scales of their own: the rounding of e4m3
# is another then, 2**-4 of a number at most.
EIGHT_BITS = {"losses": 2**-7, "norms": 2**-4}
SAME = {"losses": 2**-13, "norms": 2**-11}  # a run in bf16 has another norm by 2**-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fp8")
    run_ranks(2, Path(fp8_layouts.__file__), str(folder), timeout=150)
    return {line["name"]: line for line in read_lines(folder / "found.jsonl")}


@pytest.mark.parametrize("name", fp8_layouts.RUNS)
def test_a_layout_trains_as_one_process_does(name: str, found: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    layout, run = fp8_layouts.of(name)
    trainer, recorder = make_trainer(run, None, Processes(), tmp_path)
    trainer.train()
    assert found[name]["layers"] == 7 * (2 if layout.startswith("pp") else 4)
    limits = SAME if layout == "stage3" else EIGHT_BITS
    expected = {"losses": [record.loss for record in recorder.records]}
    expected["norms"] = [record.grad_norm for record in recorder.records]
    for kind, limit in limits.items():
        for one, other in zip(found[name][kind], expected[kind], strict=True):
            assert abs(one - other) <= limit * abs(other), kind
