"""A checkpoint of any layout, resumed on any other: the same numbers, and the trajectory of a run that never stopped.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arriero.config.parallel import ParallelOptions
from arriero.formats.parts import Part
from arriero.parallel.processes import Processes, stop
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import LAYOUTS, Run, append, join, layouts_of, make_trainer, read_lines, run_ranks

ONE = "one process"
NAMES = [ONE, *LAYOUTS]
STEPS, SAVED, MICRO_BATCHES, LIMIT = 3, 1, 4, 1e-5
METHODS = ("full", "LoRA")
Pair = tuple[str, str, str]  # method, layout that saves, layout that resumes


def every_pair() -> list[Pair]:
    return list(product(METHODS, NAMES, NAMES))


def some_pairs() -> list[Pair]:
    """Every layout saves once and resumes once, by one method or the other."""
    return [(METHODS[number % 2], NAMES[(number + 7) % len(NAMES)], name) for number, name in enumerate(NAMES)]


# What each process does


def run_of(method: str, layout: str) -> Run:
    """Four micro-batches a step, whoever computes them."""
    copies = 1
    if layout != ONE:
        world, flags = LAYOUTS[layout]
        copies = ParallelOptions(**flags).layout(world).data
    return Run(lora=method == "LoRA", accumulation=MICRO_BATCHES // copies, copies=copies, steps=STEPS)


def trainer_of(method: str, layout: str, processes: Processes, folder: Path, save: bool) -> tuple[Trainer, Any]:
    callbacks: list[Any] = [Checkpointing("steps", SAVED)] if save else []
    run, name = run_of(method, layout), None if layout == ONE else layout
    return make_trainer(run, name, processes, folder, callbacks)


def held(trainer: Trainer) -> dict[str, Part]:
    """What this process holds of weights and optimizer, under the names of the files."""
    found = {}
    for kind, parts in (("weight", trainer.weights.parts()), ("state", trainer.optimizer.parts())):
        for name, part in parts.items():
            owner, _, what = name.rpartition(".")
            stored = part.placement.stored_as
            if kind == "state" and (where := trainer.optimizer.placements[owner]).stored_as:
                stored = f"{where.stored_as}.{what}"
            found[f"{kind} {stored or name}"] = part
    return found


def save(folder: Path, layouts: Any, pairs: list[Pair]) -> None:
    """Train a step, write a checkpoint, and note beside it what each process held; no code is shared with that."""
    wanted = {(method, source) for method, source, _ in pairs}
    for layout, processes in layouts:
        for method in METHODS:
            if (method, layout) not in wanted:
                continue
            run_folder = folder / method / layout
            trainer, recorder = trainer_of(method, layout, processes, run_folder, save=True)
            recorder.stop_after = SAVED
            trainer.train()
            parts = {name: part for name, part in held(trainer).items() if part.tensor.numel()}
            where = {name: (part.placement.shape, part.placement.offset) for name, part in parts.items()}
            save_file(
                {name: part.tensor.detach().clone() for name, part in parts.items()},
                run_folder / f"held-{processes.rank}.safetensors",
                metadata={"where": json.dumps(where)},
            )


@lru_cache(maxsize=64)
def whole(run_folder: Path) -> dict[str, Tensor]:
    """The tensors of a run, put together from what each of its processes held."""
    found: dict[str, Tensor] = {}
    for path in sorted(run_folder.glob("held-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, (shape, offset) in json.loads(file.metadata()["where"]).items():
                tensor = file.get_tensor(name)
                target = found.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
                box = tuple(slice(at, at + size) for at, size in zip(offset, tensor.shape, strict=True))
                before = target[box]
                # where several hold the same, they must
                assert torch.equal(torch.where(before.isnan(), tensor, before), tensor), f"{path}: {name}"
                target[box] = tensor
    assert not any(tensor.isnan().any() for tensor in found.values()), f"{run_folder}: not all is held by somebody"
    return found


def resume(folder: Path, layouts: Any, pairs: list[Pair]) -> None:
    for layout, processes in layouts:
        for method, source, target in pairs:
            if target != layout:
                continue
            saved = folder / method / source
            trainer, recorder = trainer_of(method, layout, processes, folder / "resumed", save=False)
            trainer.resume(saved / f"checkpoint-{SAVED}")
            truth, own = whole(saved), held(trainer)
            wrong = [name for name, p in own.items() if not torch.equal(p.tensor, truth[name][p.placement.box])]
            told = processes.exchange([sorted(own), wrong])
            missing = truth.keys() - {name for names, _ in told for name in names}
            trainer.train()
            if processes.first:
                steps = [[record.step, record.loss, record.grad_norm] for record in recorder.records]
                result = {"pair": [method, source, target], "steps": steps, "missing": sorted(missing)}
                append(folder / "results.jsonl", result | {"wrong": [name for _, names in told for name in names]})


def uninterrupted(folder: Path) -> None:
    for method in METHODS:
        trainer, recorder = trainer_of(method, ONE, Processes(), folder, save=False)
        trainer.train()
        steps = [[record.step, record.loss, record.grad_norm] for record in recorder.records]
        (folder / f"{method}.json").write_text(json.dumps(steps), encoding="utf-8")


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    pairs = [tuple(pair) for pair in json.loads((folder / "pairs.json").read_text(encoding="utf-8"))]
    processes = Processes()

    def layouts() -> Any:
        nonlocal processes
        if world == 1:
            yield ONE, processes
            return
        for name, processes in join(layouts_of(world)):
            yield name, processes

    if what == "save":
        if world == 1:
            uninterrupted(folder)
        save(folder, layouts(), pairs)  # type: ignore[arg-type]
    else:
        resume(folder, layouts(), pairs)  # type: ignore[arg-type]
    stop(processes)


# What they found


def check_pairs(pairs: list[Pair], folder: Path) -> None:
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    for what in ("save", "resume"):
        for world in (1, 2, 4):
            run_ranks(world, Path(__file__), what, str(folder), timeout=1800)
    truth = {method: json.loads((folder / f"{method}.json").read_text(encoding="utf-8")) for method in METHODS}
    found = read_lines(folder / "results.jsonl")
    assert sorted(tuple(line["pair"]) for line in found) == sorted(pairs)
    problems = []
    for line in found:
        expected = truth[line["pair"][0]][SAVED:]
        assert [step for step, *_ in line["steps"]] == [step for step, *_ in expected] == [2, 3]
        apart = max(
            abs(a - b) / abs(a)
            for right, step in zip(expected, line["steps"], strict=True)
            for a, b in zip(right[1:], step[1:], strict=True)
        )
        if line["wrong"] or line["missing"] or not apart <= LIMIT:
            problems.append((line["pair"], f"{apart:.1e}", line["wrong"][:3], line["missing"][:3]))
    assert not problems


@pytest.mark.timeout(600)
def test_every_layout_resumes_and_is_resumed(tmp_path: Path) -> None:
    check_pairs(some_pairs(), tmp_path)


@pytest.mark.peers
@pytest.mark.timeout(3600)
def test_every_layout_resumes_from_every_other(tmp_path: Path) -> None:
    check_pairs(every_pair(), tmp_path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
