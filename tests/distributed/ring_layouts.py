"""Ring attention in training, on several layouts: the cells of `layout_grid.py` for it, as a program with the same roles.

python ring_layouts.py reference FOLDER    what one process computes
python ring_layouts.py ranks FOLDER        what each of several processes does
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arriero.config.parallel import ParallelOptions

sys.path.insert(0, str(Path(__file__).parent))
import layout_grid
from layout_grid import VARIATIONS, Cell
from layout_runs import LAYOUTS, Run

_RING: dict[str, Any] = {"context_parallel_degree": 2, "context_parallel_method": "ring"}
RINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2 ring": (2, _RING),
    "cp4 ring": (4, _RING | {"context_parallel_degree": 4}),
    "cp2 ring x dp2": (4, _RING | {"sharding": ["stage2"]}),
    "cp2 ring x tp2": (4, _RING | {"tensor_parallel_degree": 2}),
    "cp2 ring x pp2": (4, _RING | {"pipeline_parallel_degree": 2}),
    "cp2 ring x pp2 zero-bubble": (
        4,
        _RING | {"pipeline_parallel_degree": 2, "virtual_pp_degree": 2, "pipeline_schedule": "zero_bubble"},
    ),
}
EVERYWHERE = {
    "full, packed": Run(accumulation=2, steps=3),
    "LoRA, matrix": Run(lora=True, packed=False, steps=3),
}
WITH_TWO = ("sliding window", "query and key norms", "RoPE by length", "recompute", "recompute attention", "compiled")
VARIED = {what: VARIATIONS[what] for what in (*WITH_TWO, "one row", "bf16 O1")}


def cells_of(part: str, world: int) -> list[Cell]:
    """Every layout with two runs; two processes with variations too."""
    del part
    cells = []
    for layout, (size, flags) in RINGS.items():
        if size == world:
            runs = EVERYWHERE | (VARIED if layout == "cp2 ring" else {})
            copies = ParallelOptions(**flags).layout(world).data
            cells += [Cell(layout, what, replace(run, copies=copies)) for what, run in runs.items()]
    return cells


if __name__ == "__main__":
    LAYOUTS.update(RINGS)
    layout_grid.cells_of = cells_of
    torch.set_num_threads(1)
    layout_grid.main()
