"""Every layout against one process: the grid and the variations, as a program.

python layout_grid.py all FOLDER       starts everything else and leaves FOLDER/results.jsonl
python layout_grid.py reference FOLDER ...   what one process computes
python layout_grid.py ranks FOLDER ...       what each of several processes does, started once per number of them
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.config.parallel import ParallelOptions
from arriero.formats.parts import Placement
from arriero.parallel.placement import local_tensors, placements
from arriero.parallel.processes import Processes, stop

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import LAYOUTS, STEPS, Run, append, compiler, join, keep_gradients, make_trainer, run_ranks, score

WORLDS = (2, 4)
PARTS = ("some", "every grid", "every variation")
HALF = {"bf16 O1": {"bf16": True}, "bf16 O2": {"bf16": True, "fp16_opt_level": "O2"}}
HALF |= {"fp16 O2": {"fp16": True, "fp16_opt_level": "O2"}}
QWEN = {"model_type": "qwen3", "rms_norm_eps": 1e-5}
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
OVERFLOWING = ("dp2", "stage2", "stage3 offload", "tp2", "pp2 zbv", "cp2", "hsdp 2x2", "tp2 x pp2")
# Each differs from the grid in one thing. Three steps; the gradients of the first are compared too.
VARIATIONS: dict[str, Run] = {
    "tied embeddings": Run(model={"tie_word_embeddings": True}),
    "tied embeddings, LoRA": Run(model={"tie_word_embeddings": True}, lora=True),
    "biases": Run(model={"attention_bias": True, "mlp_bias": True}),
    "biases, LoRA": Run(model={"attention_bias": True, "mlp_bias": True}, lora=True),
    "query and key norms": Run(model=QWEN),
    "sliding window": Run(model={"model_type": "mistral", "sliding_window": 5}),
    "RoPE by length": Run(model=DYNAMIC),
    "recompute": Run(precision={"recompute": True}),
    "recompute attention": Run(precision={"recompute": True, "recompute_granularity": "core_attn"}),
    "compiled": Run(compiled=True),
    "compiled, matrix": Run(compiled=True, packed=False),
    "label smoothing": Run(optimization={"label_smoothing": 0.1}),
    "one row": Run(rows=1),
    # with AdamW's usual epsilon one process is ill-conditioned here: 1e-7 on its weights moves the third norm by 5e-4
    "shared beginnings": Run(prefixes=True, rows=27, optimization={"adam_epsilon": 1e-5}),
    **{name: Run(precision=options) for name, options in HALF.items()},
}
VARIATIONS = {
    name: replace(run, steps=3, accumulation=2 if run.rows is None else 1) for name, run in VARIATIONS.items()
}
# The layouts that have a variation in `make test`: those where it takes a path of its own.
SOME: dict[str, tuple[str, ...]] = {
    "tied embeddings": ("pp2 1f1b", "pp2 zbv", "tp2 x fsdp2"),
    "tied embeddings, LoRA": ("tp2", "pp2 interleaved"),
    "biases": ("tp4, 2 kv heads", "pp2 x fsdp2"),
    "biases, LoRA": ("tp2 whole sequences", "stage1"),
    "query and key norms": ("tp2", "cp2"),
    "sliding window": ("cp2", "pp2 1f1b"),
    "RoPE by length": ("tp2", "cp2 x pp2"),
    "recompute": ("stage3", "pp2 zero-bubble", "tp2 x pp2"),
    "recompute attention": ("tp2 whole sequences", "cp2"),
    "compiled, matrix": ("tp2",),  # six seconds; packed rows, whose lengths differ, take ten
    "label smoothing": ("tp2", "cp2 x tp2"),
    "one row": ("dp2", "hsdp 2x2"),
    "shared beginnings": ("stage2", "pp2 zero-bubble"),
    "bf16 O1": ("stage3 offload", "pp2 interleaved"),
    "bf16 O2": ("stage1", "tp2"),
    "fp16 O2": ("stage2", "pp2 zbv"),
}


def copies(layout: str) -> int:
    world, flags = LAYOUTS[layout]
    return ParallelOptions(**flags).layout(world).data


@dataclass(frozen=True)
class Cell:
    """One layout, one run."""

    layout: str
    what: str
    run: Run

    @property
    def name(self) -> str:
        return f"{self.layout}: {self.what}"

    @property
    def truth(self) -> Run:
        """The same by a lone process that keeps everything and compiles nothing."""
        kept = {key: value for key, value in self.run.precision.items() if not key.startswith("recompute")}
        return replace(self.run, compiled=False, precision=kept)


def grid(world: int, *, every: bool = False) -> list[Cell]:
    """Each layout with all eight runs; or shorter, two that have nothing in common for two processes and one for four."""
    runs = list(itertools.product((False, True), (1, 3), (False, True)))

    def chosen(number: int, index: int) -> bool:
        return number % 4 in (index, 7 - index) if world == 2 else number % 8 == index

    return [
        Cell(
            layout,
            f"{'LoRA' if lora else 'full'}, accumulation {accumulation}, {'packed' if packed else 'matrix'}",
            Run(lora, accumulation, copies(layout), packed, steps=STEPS if every else 3),
        )
        for number, layout in enumerate(LAYOUTS)
        for index, (lora, accumulation, packed) in enumerate(runs)
        if LAYOUTS[layout][0] == world and (every or chosen(number, index))
    ]


def possible(layout: str, what: str) -> bool:
    """Whether a layout can have a variation."""
    if what == "shared beginnings":  # `finetune` does not share them there
        return "cp" not in layout
    return not what.startswith("compiled") or not layout.endswith(("zero-bubble", "zbv"))  # refused


def variations(world: int, *, every: bool = False) -> list[Cell]:
    """All layouts with all variations that they can have; or those of `SOME`."""
    return [
        Cell(layout, what, replace(run, copies=copies(layout)))
        for layout, (size, _) in LAYOUTS.items()
        for what, run in VARIATIONS.items()
        if size == world and (possible(layout, what) if every else layout in SOME.get(what, ()))
    ]


def cells_of(part: str, world: int) -> list[Cell]:
    """Of both kinds some, or all of one, layout by layout: processes take up each layout once."""
    if part == "some":
        found = grid(world) + variations(world)
        return sorted(found, key=lambda cell: list(LAYOUTS).index(cell.layout))
    return grid(world, every=True) if part == "every grid" else variations(world, every=True)


def run_cell(cell: Cell, layout: str | None, processes: Processes, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """Numbers, the trainer, and the first step's gradients."""
    run = cell.run if layout else cell.truth
    with compiler(run):
        trainer, recorder = make_trainer(run, layout, processes, folder)
        gradients = keep_gradients(trainer)
        trainer.train()
        scores = score(trainer, run)
    records = recorder.records
    numbers = {
        "loss": [record.loss for record in records],
        "norm": [record.grad_norm for record in records],
        "tokens": [record.label_tokens for record in records],
        "skipped": [record.skipped for record in records],
        "eval_loss": [scores["loss"]],
        "accuracy": scores["accuracy"],
    }
    return numbers, trainer, gradients


def reference(folder: Path, part: str) -> None:
    """What a lone process computes of every run, into FOLDER/reference."""
    (folder / "reference").mkdir(parents=True, exist_ok=True)
    for cell in (cell for world in WORLDS for cell in cells_of(part, world)):
        path = folder / "reference" / cell.truth.key
        if path.with_suffix(".json").exists():
            continue
        numbers, trainer, gradients = run_cell(cell, None, Processes(), folder)
        tensors = {f"weight {name}": p.detach().contiguous() for name, p in trainer.model.named_parameters()}
        tensors |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
        save_file(tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")


def distance(truth: list[float], found: list[float]) -> float:
    """The largest relative difference."""
    if len(truth) != len(found):
        return math.inf
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(truth, found, strict=True))


def tensor_distance(
    truth: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Mapping[str, Placement], processes: Processes
) -> tuple[float, float]:
    """|found - truth| / |truth|: of all tensors as one vector, and the largest of a tensor (of those that weigh something)."""
    names = sorted(truth)
    squares = dict.fromkeys(names, (0.0, 0.0))
    for name, tensor in found.items():
        place = where[name]
        if place.writes and tensor.numel():
            right = truth[place.stored_as or name][place.box].double()
            squares[place.stored_as or name] = (
                float((tensor.detach().double() - right).square().sum()),
                float(right.square().sum()),
            )
    totals = processes.sum([number for name in names for number in squares[name]])
    pairs = list(zip(totals[::2], totals[1::2], strict=True))
    whole = sum(right for _, right in pairs)
    compared = sum(float(tensor.double().square().sum()) for tensor in truth.values())
    if abs(whole - compared) > 1e-9 * compared:  # a part of the model is held by nobody
        return math.inf, math.inf
    floor = 1e-8 * whole  # a tensor below 1e-4 of the whole is rounding of the others
    worst = max(math.sqrt(wrong / right) for wrong, right in pairs if right > floor)
    return math.sqrt(sum(wrong for wrong, _ in pairs) / whole), worst


def compare(cell: Cell, processes: Processes, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    numbers, trainer, gradients = run_cell(cell, cell.layout, processes, folder)
    path = folder / "reference" / cell.truth.key
    truth = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))
    result: dict[str, Any] = {"name": cell.name, "layout": cell.layout, "what": cell.what}
    result |= {key: distance(truth[key], numbers[key]) for key in ("loss", "norm", "eval_loss")}
    for kind, found in (("gradient", gradients), ("weight", local_tensors(trainer.model))):
        right = {name.partition(" ")[2]: tensor for name, tensor in tensors.items() if name.startswith(kind)}
        where = placements(trainer.model)
        result[kind], result[f"worst_{kind}"] = tensor_distance(right, found, where, processes)
    result |= {key: [truth[key], numbers[key]] for key in ("tokens", "skipped", "accuracy")}
    # every process must tell the same
    told = processes.exchange({key: numbers[key] for key in ("loss", "norm", "skipped", "eval_loss", "accuracy")})
    result["agree"] = all(one == told[0] for one in told)
    result["seconds"] = round(time.monotonic() - began, 3)
    return result


def overflow(layout: str, processes: Processes, folder: Path) -> dict[str, Any]:
    """Three steps in fp16, of which in the second one gradient of the last process overflows."""
    run = Run(copies=copies(layout), precision=HALF["fp16 O2"], optimization={"warmup_steps": 0})
    trainer, _ = make_trainer(run, layout, processes, folder)
    train, last = trainer.execution.train, processes.rank == processes.size - 1

    def spoiled(batches: Any, label_tokens: int, optimizer: Any) -> float:
        share = train(batches, label_tokens, optimizer)
        if trainer.state.step == 1 and last:
            next(iter(optimizer.gradients().values())).view(-1)[0] = math.inf
        return share

    trainer.execution.train = spoiled  # type: ignore[method-assign]
    trainer.model.train()
    told = []
    for _ in range(3):
        before = {name: tensor.clone() for name, tensor in local_tensors(trainer.model).items()}
        skipped = trainer.step().skipped
        moved = any(not torch.equal(before[name], tensor) for name, tensor in local_tensors(trainer.model).items())
        told.append([skipped, moved, trainer.precision.scaler.get_scale()])
    return {"name": f"{layout}: overflow", "told": processes.exchange(told)}


def ranks(folder: Path, part: str, only: str) -> None:
    cells = [cell for cell in cells_of(part, int(os.environ["WORLD_SIZE"])) if only in cell.name]
    results = folder / "results.jsonl"
    processes = Processes()
    for layout, processes in join(list(dict.fromkeys(cell.layout for cell in cells))):
        for cell in cells:
            if cell.layout != layout:
                continue
            try:
                result = compare(cell, processes, folder)
            except Exception:  # the others wait for this one: all end here, and the cells that follow have no result
                append(results, {"name": cell.name, "layout": layout, "error": traceback.format_exc()[-2000:]})
                os._exit(1)
            if processes.first:
                append(results, result)
        if part == "some" and layout in OVERFLOWING:
            result = overflow(layout, processes, folder)
            if processes.first:
                append(results, result)
    stop(processes)


def run_all(folder: Path, part: str, only: str = "", timeout: float = 900) -> dict[str, float]:
    """Start a lone process and then each number of processes once; results in FOLDER/results.jsonl.

    Returns:
        Seconds of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (str(folder), "--part", part, "--only", only)
    seconds = {"1": run_ranks(1, Path(__file__), "reference", *arguments, timeout=timeout)}
    for world in WORLDS:
        try:
            seconds[str(world)] = run_ranks(world, Path(__file__), "ranks", *arguments, timeout=timeout)
        except RuntimeError as error:
            append(folder / "results.jsonl", {"name": f"{world} processes", "error": str(error)[-6000:]})
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["all", "reference", "ranks"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="every grid", choices=PARTS)
    parser.add_argument("--only", default="", help="a part of the cell's name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.role == "all":
        print(run_all(given.folder, given.part, given.only))
    elif given.role == "reference":
        reference(given.folder, given.part)
    else:
        ranks(given.folder, given.part, given.only)


if __name__ == "__main__":
    main()
