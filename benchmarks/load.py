"""How long a checkpoint takes from a new process to a model that has computed a token, and what memory that takes.

Both sides read the same folder in fp32 and compute the next token of one prompt; each is a process of its own, they take turns.
Seconds are from the start of the process, imports included, and of the loading alone; the page cache is warm on both sides.

    make bench BENCH=load
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import records
from records import Record

SIDES = ("arriero", "transformers")
MODEL = "smollm2-135m-instruct"
IDS = [1, 4093, 198, 1780]
FIGURES = {
    "seconds": ("a model of 135M from a new process to its first token", "s"),
    "load": ("loading a checkpoint of 135M, without imports", "s"),
    "gib": ("loading a checkpoint of 135M: peak memory", "GiB"),
}


def arriero_side(folder: Path) -> tuple[float, int]:
    import torch

    from arriero.formats import hf

    start = time.perf_counter()
    model = hf.load_model(folder, dtype=torch.float32)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        return loaded, int(model(torch.tensor([IDS]))[0, -1].argmax())


def transformers_side(folder: Path) -> tuple[float, int]:
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        return loaded, int(model(torch.tensor([IDS])).logits[0, -1].argmax())


def measure(side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--side", side, "--model", str(folder)]
    told = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ).stdout
    seconds = time.perf_counter() - start
    return {**json.loads(told.splitlines()[-1]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    records.add_json(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        load, token = (arriero_side if given.side == "arriero" else transformers_side)(Path(given.model))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"load": load, "token": token, "gib": memory}))
        return
    from arriero.formats.download import resolve_model

    folder = resolve_model(given.model)
    for side in SIDES:  # fills the page cache
        measure(side, folder)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side in SIDES:
            runs[side].append(measure(side, folder))
    if len({run["token"] for side in SIDES for run in runs[side]}) != 1:
        raise SystemExit("the two sides do not agree on the next token")
    told = [
        Record.of_costs(
            "load", what, unit, *([run[key] for run in runs[side]] for side in SIDES), peer_name="transformers"
        )
        for key, (what, unit) in FIGURES.items()
    ]
    records.show(told)
    records.write(given.json, told)


if __name__ == "__main__":
    main()
