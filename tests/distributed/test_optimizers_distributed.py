"""Muon and 8-bit AdamW on every way to cut matrices, beside one process; and their checkpoints from layout to layout.

This file is also the program that each of several processes runs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import LAYOUTS, Run, append, join, make_trainer, read_lines, run_ranks

from arriero.config.parallel import ParallelOptions
from arriero.formats.parts import Part
from arriero.parallel.placement import local_tensors, placements
from arriero.parallel.processes import Processes, stop
from arriero.training.checkpoint import take_snapshot, write_checkpoint
from arriero.training.optimizers.adamw_8bit import AdamW8bit
from arriero.training.trainer import Trainer

LAYOUTS |= {"fsdp4": (4, {"sharding": ["stage3"]}), "stage1 of 4": (4, {"sharding": ["stage1"]})}
NAMES = {
    2: ("dp2", "stage2", "stage3", "stage3 offload", "tp2", "tp2 whole sequences", "pp2 1f1b", "pp2 zbv", "cp2"),
    4: ("fsdp4", "stage1 of 4", "hsdp 2x2", "tp4, 2 kv heads", "tp2 x fsdp2", "tp2 x pp2", "pp2 x fsdp2", "cp2 x tp2"),
}
SAVED_AT = 3
# 42 rows are 11, 11, 11 and 9 of four processes; the 3 rows of an adapter leave the fourth with nothing
MUON = Run(optimization={"optim": "muon"}, model={"intermediate_size": 42})
# matrices of 4096 numbers and more, and parts of them that are smaller
PACKED = Run(
    optimization={"optim": "adamw_8bit"}, model={"hidden_size": 64, "head_dim": 16, "intermediate_size": 90}, accumulation=2
)
RUNS = {"muon": MUON, "muon LoRA": replace(MUON, lora=True), "muon O2": replace(MUON, precision={"bf16": True, "fp16_opt_level": "O2"}), "8-bit": PACKED}  # fmt: skip
CASES = [(world, layout, what) for world, layouts in NAMES.items() for layout in layouts for what in RUNS]


def copies(layout: str) -> int:
    world, flags = LAYOUTS[layout]
    return ParallelOptions(**flags).layout(world).data


def truth(folder: Path, what: str, data: int) -> Path:
    """Where a lone process leaves what it computes of the data of so many."""
    return folder / f"{what} {data}"


def parameters(trainer: Trainer) -> dict[str, Part]:
    """This process's parts of all parameters."""
    where = placements(trainer.model)
    return {name: Part(tensor.detach(), where[name]) for name, tensor in local_tensors(trainer.model).items()}


def save(trainer: Trainer, folder: Path) -> Path:
    parts = trainer.optimizer.parts()
    return write_checkpoint(folder, take_snapshot(trainer.weights, parts, trainer.state, copy=False), trainer.processes)


def train_from(
    run: Run, layout: str | None, processes: Processes, folder: Path, checkpoint: Path | None, stop_after: int | None = None
) -> tuple[Trainer, list[list[float]]]:
    trainer, recorder = make_trainer(run, layout, processes, folder)
    recorder.stop_after = stop_after
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.train()
    return trainer, [[record.loss, record.grad_norm] for record in recorder.records]


# What the processes do


def distance(trainer: Trainer, expected: Mapping[str, Tensor]) -> float:
    """Relative L2 difference of all parameters, over all processes."""
    error = norm = 0.0
    for name, part in parameters(trainer).items():
        other = expected[part.placement.stored_as or name][part.placement.box].double()
        error += float((part.tensor.double() - other).square().sum()) / part.placement.copies
        norm += float(other.square().sum()) / part.placement.copies
    error, norm = trainer.processes.sum([error, norm])
    return float((error / norm) ** 0.5)


def equal(one: Mapping[str, Part], other: Mapping[str, Part]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(part.tensor, other[name].tensor) for name, part in one.items())


def packed_names(trainer: Trainer) -> list[str]:
    return [name for rule in trainer.optimizer.rules if isinstance(rule, AdamW8bit) for name in rule.tensors]


def compare(layout: str, what: str, processes: Processes, folder: Path) -> dict[str, Any]:
    run = replace(RUNS[what], copies=copies(layout))
    there, own = truth(folder, what, run.copies), folder / f"{layout} {what}"
    expected = load_file(there / "weights.safetensors")
    straight, records = train_from(run, layout, processes, own, None)
    half, first = train_from(run, layout, processes, own, None, SAVED_AT)
    checkpoint = save(half, own)
    resumed, last = train_from(run, layout, processes, own, checkpoint)
    moved, moved_records = train_from(run, layout, processes, own, there / f"checkpoint-{SAVED_AT}")
    again = processes.any(
        first + last != records
        or not equal(parameters(straight), parameters(resumed))
        or not equal(straight.optimizer.parts(), resumed.optimizer.parts())
    )
    return {
        "records": records,
        "weights": distance(straight, expected),
        "resumed as it was": not again,
        "moved records": moved_records,
        "moved weights": distance(moved, expected),
        "packed": sorted({name for names in processes.exchange(packed_names(straight)) for name in names}),
        "held": processes.max([float(straight.optimizer.bytes_held())])[0],
    }


def main(world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for layout, processes in join(NAMES[world]):
        for what in RUNS:
            found = compare(layout, what, processes, folder)
            if processes.first:
                append(folder / f"{world}.jsonl", {"layout": layout, "what": what, **found})
    stop(processes)


# What is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a lone process computes: records, weights, a checkpoint on the way, and the distance to AdamW in fp32."""
    folder = tmp_path_factory.mktemp("optimizers")
    for data in sorted({copies(layout) for _, layout, _ in CASES}):
        for what, run in RUNS.items():
            run, there = replace(run, copies=data), truth(folder, what, data)
            trainer, records = train_from(run, None, Processes(), there, None)
            weights = {name: part.tensor for name, part in parameters(trainer).items()}
            there.mkdir(parents=True)
            save_file(weights, there / "weights.safetensors")
            save(train_from(run, None, Processes(), there, None, SAVED_AT)[0], there)
            exact = replace(run, optimization={})
            found = distance(train_from(exact, None, Processes(), there, None)[0], weights)
            packed, held = packed_names(trainer), trainer.optimizer.bytes_held()
            append(there / "found.jsonl", {"records": records, "to AdamW": found, "packed": sorted(packed), "held": held})
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    for world in NAMES:
        seconds = run_ranks(world, Path(__file__), str(world), str(folder), timeout=150)
        print(f"{world} processes: {seconds:.0f} s")
    lines = [line for world in NAMES for line in read_lines(folder / f"{world}.jsonl")]
    return {(line["layout"], line["what"]): line for line in lines}


def difference(records: list[list[float]], expected: list[list[float]]) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    pairs = [pair for one, other in zip(records, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(("world", "layout", "what"), CASES)
def test_every_layout(
    world: int, layout: str, what: str, results: dict[tuple[str, str], dict[str, Any]], folder: Path
) -> None:
    """Muon: as one process does, also from its checkpoint. 8-bit AdamW, whose blocks lie otherwise: nearer to one process's
    than AdamW in fp32 is. Both: from a checkpoint of the same layout to the bit."""
    found = results[layout, what]
    [expected] = read_lines(truth(folder, what, copies(layout)) / "found.jsonl")
    print(layout, what, {key: value for key, value in found.items() if "weights" in key}, difference(found["records"], expected["records"]), expected["to AdamW"])  # fmt: skip
    assert found["resumed as it was"]
    assert found["packed"] == expected["packed"]
    assert len(found["packed"]) == (4 * 5 + 1 if what == "8-bit" else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
