"""LoRA as litgpt trains it by itself, and the same rows in arriero: useful tokens a second and memory, in turns.

The task is litgpt's own (`litgpt finetune_lora` with its defaults): adapters of rank 8 on queries and values, dropout 0.05,
Alpaca's prompt, every token of a row learned, 16 rows a step, one row a micro-batch; here in fp32 on a CPU with SmolLM2-135M.
What it draws is recorded, and arriero trains on the same token ids with the same rows in each step, in micro-batches of as many
tokens as the longest row has, which is litgpt's largest. litgpt has an environment of its own, `.venv-litgpt`.

    make bench BENCH=litgpt_side ARGS="--install"      make the environment first (once; torch and 50 packages)
    make bench BENCH=litgpt_side ARGS="--steps 3 --rounds 2"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import records
from records import Record
from sides import make_environment, run_side

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-litgpt"
PACKAGES = ("torch==2.13.0", "litgpt==0.5.13")
MISSING = "litgpt is not installed: make bench BENCH=litgpt_side ARGS=--install"
DATA = ROOT.parent / "shared" / "data" / "instruct" / "seed_tasks.jsonl"
NAME = "SmolLM2-135M-Instruct"
RANK, ALPHA, DROPOUT = 8, 16, 0.05  # litgpt's defaults
STEP_ROWS, MICRO_ROWS = 16, 1
LEARNING_RATE = 1e-4


def write_rows(source: Path, folder: Path) -> None:
    """The rows as litgpt's JSON data takes them; the first two are for its check before training."""
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        answered = task["instances"][0] if "instances" in task else task  # as the seed tasks of Alpaca have them
        told = {"instruction": task["instruction"], "input": answered.get("input", ""), "output": answered["output"]}
        rows.append(told)
    folder.mkdir()
    (folder / "val.json").write_text(json.dumps(rows[:2]))
    (folder / "train.json").write_text(json.dumps(rows[2:]))


def convert(model: Path, folder: Path) -> None:
    """A model folder as litgpt wants it: links to ours, and what it makes of them."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    code = "from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint as c; from pathlib import Path; import sys; "
    code += f"c(Path(sys.argv[1]), model_name={NAME!r})"
    command = [str(ENVIRONMENT / "bin/python"), "-c", code, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_litgpt(arguments: argparse.Namespace) -> dict[str, Any]:
    """litgpt's own fine-tuning, in litgpt's environment; seconds of each step, and the rows that it drew."""
    import litgpt.finetune.lora as lora  # type: ignore[import-not-found]
    import torch
    from litgpt.args import EvalArgs, TrainArgs  # type: ignore[import-not-found]
    from litgpt.data import JSON  # type: ignore[import-not-found]

    torch.set_num_threads(arguments.threads)
    rows: list[list[int]] = []
    ends: list[float] = []

    class Recorded(lora.CycleIterator):  # type: ignore[misc]
        """Keeps what is drawn and when: one call a row, so a step is from one call to that of 16 rows later."""

        def __next__(self) -> Any:
            ends.append(time.perf_counter())
            batch = super().__next__()
            rows.extend(ids.tolist() for ids in batch["input_ids"])
            return batch

    lora.CycleIterator = Recorded
    fit = lora.fit

    def timed_fit(*given: Any, **named: Any) -> Any:
        found = fit(*given, **named)
        ends.append(time.perf_counter())
        return found

    lora.fit = timed_fit
    for name in ("save_hyperparameters", "merge_lora"):  # after training, and not what is measured
        setattr(lora, name, lambda *_, **__: None)
    with tempfile.TemporaryDirectory() as scratch:
        lora.setup(
            checkpoint_dir=Path(arguments.checkpoint),
            out_dir=Path(scratch) / "out",
            precision="32-true",
            devices=1,
            lora_r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            data=JSON(json_path=Path(arguments.data), num_workers=0),
            train=TrainArgs(
                global_batch_size=STEP_ROWS,
                micro_batch_size=1,
                max_steps=arguments.steps,
                epochs=100,
                lr_warmup_steps=1,
                save_interval=None,
            ),
            eval=EvalArgs(
                interval=10**6, max_new_tokens=1, initial_validation=False, final_validation=False, max_iters=1
            ),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": LEARNING_RATE}},
        )
    marks = ends[::STEP_ROWS]
    return {"rows": rows, "seconds": [b - a for a, b in pairwise(marks)]}


def run_arriero(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same rows by `packing.py`'s own side."""
    import packing
    import torch

    from arriero.adapters.lora import LoRAConfig
    from arriero.data.sft import IGNORE
    from arriero.formats.download import resolve_model

    torch.set_num_threads(arguments.threads)
    drawn = json.loads(Path(arguments.data).read_text())
    rows = [{"input_ids": ids, "labels": [*ids[1:], IGNORE]} for ids in drawn]
    adapter = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT, target_modules=("q_proj", "v_proj"))
    given = argparse.Namespace(
        batch=MICRO_ROWS,
        accumulation=STEP_ROWS // MICRO_ROWS,
        steps=arguments.steps,
        learning_rate=LEARNING_RATE,
        no_share_prefixes=False,
    )
    return packing.run_arriero(resolve_model(arguments.model), rows, given, adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dataset_path", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="make .venv-litgpt, and do nothing else")
    records.add_json(parser)
    parser.add_argument("--side", choices=("litgpt", "arriero"), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.install:
        make_environment(ENVIRONMENT, PACKAGES)
        return
    if arguments.side:
        found = run_litgpt(arguments) if arguments.side == "litgpt" else run_arriero(arguments)
        found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found))
        return
    if not (ENVIRONMENT / "bin/python").is_file():
        raise SystemExit(MISSING)
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Rounds of both sides, litgpt first: it draws the rows."""
    from arriero.formats.download import resolve_model

    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    common = ["--steps", str(arguments.steps), "--threads", str(arguments.threads), "--model", arguments.model]
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        data, checkpoint, drawn = (Path(scratch) / name for name in ("data", NAME, "rows.json"))
        write_rows(arguments.dataset_path, data)
        convert(resolve_model(arguments.model), checkpoint)
        for _ in range(arguments.rounds):
            options = [*common, "--checkpoint", str(checkpoint)]
            theirs.append(run_side(__file__, options, "litgpt", data, python=ENVIRONMENT / "bin/python", **threads))
            rows = theirs[-1].pop("rows")[: arguments.steps * STEP_ROWS]
            drawn.write_text(json.dumps(rows))
            ours.append(run_side(__file__, common, "arriero", drawn, **threads))
            tokens = sum(map(len, rows[STEP_ROWS:]))
            for found in (ours[-1], theirs[-1]):
                found["speed"] = tokens / sum(found["seconds"][1 : arguments.steps])
    what = "LoRA, litgpt's own task (queries and values, Alpaca rows, 16 a step)"
    more: dict[str, Any] = {"peer_name": PACKAGES[1].replace("==", " "), "threads": arguments.threads}
    told = []
    for key, unit, make in (("speed", "useful tok/s", Record.of_rounds), ("memory_gib", "GiB", Record.of_costs)):
        name = what if key == "speed" else f"{what}: peak memory"
        values = ([run[key] for run in side] for side in (ours, theirs))
        told.append(make("litgpt_side", name, unit, *values, **more))
    records.show(told)
    records.write(arguments.json, told)


if __name__ == "__main__":
    main()
