"""Layouts with a device for each process: FSDP's process group of one, and the grid on 2, 4 and 8 GPUs over NCCL.

The bodies run on the CPU too, so that they are known to be right before they meet a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from layout_runs import LAYOUTS, layouts_of, read_lines, run_ranks

PROGRAM = Path(__file__).parent / "layouts_on_devices.py"
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
RUNS = 4


def needs(count: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu, pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("device", "world", "layouts"),
    [
        ("cpu", 1, ["one"]),
        ("cpu", 2, ["stage3"]),
        pytest.param("cuda", 1, ["one"], marks=needs(1)),
        pytest.param("cuda", 2, layouts_of(2), marks=needs(2)),
        pytest.param("cuda", 4, layouts_of(4), marks=needs(4)),
    ],
)
def test_layouts_are_one_process(device: str, world: int, layouts: list[str], tmp_path: Path) -> None:
    """Losses, gradient norms and weights in fp32; bf16 within its rounding."""
    assert world == 1 or all(LAYOUTS[name][0] == world for name in layouts)
    run_ranks(world, PROGRAM, device, str(tmp_path), *layouts, timeout=500)
    found = read_lines(tmp_path / "found.jsonl")
    assert [line["layout"] for line in found] == [name for name in layouts for _ in range(RUNS)]
    for line in found:
        offloaded = "offload" in line["layout"]
        assert line["device"].startswith("cpu" if offloaded else device)
        half = line["what"].startswith("bf16")
        assert line["steps"] <= (2e-2 if half else 1e-5), line
        assert line["weights"] <= (2e-2 if half else 1e-5), line
