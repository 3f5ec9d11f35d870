"""Muon, SGD and 8-bit AdamW on every way to cut matrices, beside one process; and their checkpoints from layout to layout.

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

FSDP4 = {"fsdp4": (4, {"sharding": ["stage3"]})}
NAMES = {
    2: ("stage3", "tp2", "pp2 1f1b", "cp2"),
    4: ("fsdp4", "hsdp 2x2", "tp4, 2 kv heads", "tp2 x fsdp2"),
}
pytestmark = pytest.mark.timeout(400)  # all processes run before the first test
SAVED_AT, NAME = 3, "checkpoint-3"
# 42 rows are 11, 11, 11 and 9 of four processes; the 3 rows of an adapter leave the fourth with nothing
MUON = Run(optimization={"optim": "muon"}, model={"intermediate_size": 42})
# matrices of 4096 numbers and more, and parts of them that are smaller
PACKED = Run(
    optimization={"optim": "adamw_8bit"},
    model={"hidden_size": 64, "head_dim": 16, "intermediate_size": 90},
    accumulation=2,
)
# Lion steps number by number as SGD does and keeps what it keeps; but a sign turns with the last bit of a mean near 0
SGD = Run(optimization={"optim": "sgd", "sgd_momentum": 0.9, "learning_rate": 0.1}, model={"intermediate_size": 42})
RUNS = {"muon": MUON, "muon LoRA": replace(MUON, lora=True), "SGD": SGD, "8-bit": PACKED}
CASES = [(layout, what) for layouts in NAMES.values() for layout in layouts for what in RUNS]
# Muon on every way to cut matrices; the others where each way differs for them
SOME = [
    case
    for case in CASES
    if case[1] == "muon"
    or case in (("tp2", "muon LoRA"), ("fsdp4", "muon LoRA"), ("tp2", "SGD"), ("fsdp4", "SGD"))
    or case in (("stage3", "8-bit"), ("tp2", "8-bit"), ("pp2 1f1b", "8-bit"), ("fsdp4", "8-bit"))
]
PARTS = {"some": SOME, "rest": [case for case in CASES if case not in SOME]}


def copies(layout: str) -> int:
    world, flags = (LAYOUTS | FSDP4)[layout]
    return ParallelOptions(**flags).layout(world).data


def truth(folder: Path, what: str, data: int) -> Path:
    """Where a lone process leaves what it computes of the data of so many."""
    return folder / f"{what} {data}"


def parameters(trainer: Trainer) -> dict[str, Part]:
    """This process's parts of all parameters."""
    where = placements(trainer.model)
    return {name: Part(tensor.detach(), where[name]) for name, tensor in local_tensors(trainer.model).items()}


def save(trainer: Trainer, folder: Path) -> None:
    parts = trainer.optimizer.parts()
    write_checkpoint(folder, take_snapshot(trainer.weights, parts, trainer.state, copy=False), trainer.processes)


def train(
    run: Run,
    layout: str | None,
    processes: Processes,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    saves: bool = False,
) -> tuple[Trainer, list[list[float]]]:
    """A run from its beginning or from a checkpoint to its end; its losses and gradient norms."""
    trainer, recorder = make_trainer(run, layout, processes, folder)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if saves:
        recorder.stop_after = SAVED_AT
        trainer.train()
        save(trainer, folder)
        recorder.stop_after, trainer.should_stop = None, False
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
    return one.keys() == other.keys() and all(
        torch.equal(part.tensor, other[name].tensor) for name, part in one.items()
    )


def packed_names(trainer: Trainer) -> list[str]:
    return [name for rule in trainer.optimizer.rules if isinstance(rule, AdamW8bit) for name in rule.tensors]


def compare(layout: str, what: str, processes: Processes, folder: Path) -> dict[str, Any]:
    run = replace(RUNS[what], copies=copies(layout))
    there, own = truth(folder, what, run.copies), folder / f"{layout} {what}"
    expected = load_file(there / "weights.safetensors")
    straight, records = train(run, layout, processes, own, saves=True)
    resumed, last = train(run, layout, processes, own, checkpoint=own / NAME)
    moved, moved_records = train(run, layout, processes, own, checkpoint=there / NAME)
    again = processes.any(
        last != records[SAVED_AT:]
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


def main(world: int, part: str, folder: Path) -> None:
    torch.set_num_threads(1)
    for layout, processes in join(NAMES[world]):
        for what in [what for name, what in PARTS[part] if name == layout]:
            found = compare(layout, what, processes, folder)
            if processes.first:
                append(folder / "found.jsonl", {"layout": layout, "what": what, **found})
    stop(processes)


# What is expected


def run_alone(cases: list[tuple[str, str]], folder: Path) -> None:
    """What a lone process computes: records, weights, a checkpoint on the way, and the distance to AdamW in fp32."""
    for what, data in sorted({(what, copies(layout)) for layout, what in cases}):
        run, there = replace(RUNS[what], copies=data), truth(folder, what, data)
        there.mkdir()
        trainer, records = train(run, None, Processes(), there, saves=True)
        weights = {name: part.tensor for name, part in parameters(trainer).items()}
        save_file(weights, there / "weights.safetensors")
        found = distance(train(replace(run, optimization={}), None, Processes(), there)[0], weights)
        packed, held = packed_names(trainer), trainer.optimizer.bytes_held()
        append(there / "found.jsonl", {"records": records, "to AdamW": found, "packed": sorted(packed), "held": held})


class Results(dict[tuple[str, str], dict[str, Any]]):
    """What the processes found, by layout and run; each part is computed when one of it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, case: tuple[str, str]) -> dict[str, Any]:
        part = "some" if case in SOME else "rest"
        folder = self.folder / part
        folder.mkdir()
        run_alone(PARTS[part], folder)
        for world in NAMES:
            run_ranks(world, Path(__file__), str(world), part, str(folder), timeout=330)
        for line in read_lines(folder / "found.jsonl"):
            [alone] = read_lines(truth(folder, line["what"], copies(line["layout"])) / "found.jsonl")
            self[line["layout"], line["what"]] = line | {"alone": alone}
        return self[case]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("optimizers"))


def marked(cases: list[tuple[str, str]]) -> list[Any]:
    return [case if case in SOME else pytest.param(*case, marks=pytest.mark.peers) for case in cases]


def difference(records: list[list[float]], expected: list[list[float]]) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    pairs = [pair for one, other in zip(records, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(("layout", "what"), marked([case for case in CASES if case[1] != "8-bit"]))
def test_exact_rules_are_those_of_one_process(layout: str, what: str, results: Results) -> None:
    """From the beginning, from its own checkpoint (to the bit), and from one process's."""
    found = results[layout, what]
    expected = found["alone"]
    assert difference(found["records"], expected["records"]) <= 1e-5
    assert found["weights"] <= 1e-5
    assert expected["to AdamW"] > 0.01  # it is another rule
    assert found["resumed as it was"]
    assert difference(found["moved records"], expected["records"][SAVED_AT:]) <= 1e-5
    assert found["moved weights"] <= 1e-5


@pytest.mark.parametrize(("layout", "what"), marked([case for case in CASES if case[1] == "8-bit"]))
def test_8_bits_are_near_those_of_one_process(layout: str, what: str, results: Results) -> None:
    """The blocks that are rounded together are others, so the runs differ as two roundings of one run in fp32 do."""
    found = results[layout, what]
    expected = found["alone"]
    # the first step's moments are exact, and a resumed step's gradients are
    assert difference(found["records"][:2], expected["records"][:2]) <= 1e-5
    assert difference(found["moved records"][:1], expected["records"][SAVED_AT : SAVED_AT + 1]) <= 1e-5
    assert 0 < expected["to AdamW"] < 2e-3
    assert found["weights"] < 2 * expected["to AdamW"]
    assert found["moved weights"] < 2 * expected["to AdamW"]
    assert found["resumed as it was"]
    # whole sizes decide, not those of the parts, which are below the limit
    assert found["packed"] == expected["packed"]
    assert len(found["packed"]) == 4 * 5 + 1


@pytest.mark.parametrize("what", ["muon", "8-bit"])
@pytest.mark.parametrize(("layout", "processes"), [("stage3", 2), ("fsdp4", 4)])
def test_the_state_is_shared_out(layout: str, processes: int, what: str, results: Results) -> None:
    found = results[layout, what]
    share = found["alone"]["held"] / processes
    assert share <= found["held"] < 1.03 * share


if __name__ == "__main__":
    LAYOUTS.update(FSDP4)  # of this process alone: other tests read the same dictionary
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
