"""Useful tokens a second of a LoRA fine-tune on uneven rows: ours packed, the transformers Trainer with PEFT padded.

Both sides train the same model on the same token ids with the same rows in each optimizer step, so that their losses are the
same numbers; what differs is how a step is cut into micro-batches. Theirs are `--batch` rows padded to the longest of them.
Ours hold as many tokens as their largest does (`--batch` rows of the longest row's length), filled by best fit: the same
memory for a micro-batch. Each side runs in a process of its own and they take turns. Useful tokens are those of the rows,
padding not counted; the first step of each process is left out.

    python benchmarks/packing.py --steps 6 --rounds 3
    python benchmarks/packing.py --group_by_length    # transformers' own remedy
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import records
from records import Record
from sides import run_side

SIDES = ("arriero", "transformers")
DATA = Path(__file__).parents[2] / "shared" / "data" / "instruct" / "seed_tasks.jsonl"
RANK, ALPHA = 8, 16


def encode(arguments: argparse.Namespace, model: Path) -> list[dict[str, list[int]]]:
    """The rows of every step, in order; labels are shifted (ours), `hf_labels` are not (transformers shifts itself)."""
    from arriero.config.row_lengths import RowLengths
    from arriero.data.order import StepOrder
    from arriero.data.sft import IGNORE, encode_all
    from arriero.data.sources import read_samples
    from arriero.data.tokenizer import load_tokenizer

    samples = read_samples(Path(arguments.dataset_path), None, "alpaca")
    lengths = RowLengths(arguments.src_length, arguments.tgt_length)
    examples, report = encode_all(samples, load_tokenizer(model), lengths)
    print(f"data: {report}")
    order = StepOrder(
        len(examples),
        arguments.batch,
        arguments.accumulation,
        0,
        lengths=[example.length for example in examples],
        group_by_length=arguments.group_by_length,
    )
    chosen = [row for step in range(arguments.steps) for batch in order(step) for row in batch]
    chosen = chosen[: arguments.steps * arguments.batch * arguments.accumulation]
    rows = [examples[row] for row in chosen]
    return [{"input_ids": row.input_ids, "labels": row.labels, "hf_labels": [IGNORE, *row.labels[:-1]]} for row in rows]


def run_arriero(
    model: Path, rows: list[dict[str, list[int]]], arguments: argparse.Namespace, adapter: Any = None
) -> dict[str, Any]:
    """
    Args:
        adapter: a `LoRAConfig` in the place of that of rank 8 on all layers.
    """
    from arriero_side import train

    from arriero.adapters.lora import LoRAConfig
    from arriero.data.order import StepOrder

    lengths = [len(row["input_ids"]) for row in rows]
    order = StepOrder(
        len(rows),
        arguments.batch,
        arguments.accumulation,
        0,
        shuffle=False,
        lengths=lengths,
        max_tokens=arguments.batch * max(lengths),
    )
    records = train(
        model,
        rows,
        order,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        adapter=adapter or LoRAConfig(rank=RANK, alpha=ALPHA),
        share_prefixes=not arguments.no_share_prefixes,
    )
    micro_batches = [len(order(step)) for step in range(arguments.steps)]
    return {
        "losses": [record.loss for record in records],
        "seconds": [record.seconds for record in records],
        "micro_batches": sum(micro_batches),
    }


def run_transformers(model: Path, rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers_side import train, with_lora

    torch.manual_seed(0)
    network = with_lora(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), RANK, ALPHA)
    clock = train(
        network,
        rows,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        accumulation=arguments.accumulation,
    )
    return {
        "losses": clock.losses,
        "seconds": clock.seconds,
        "micro_batches": arguments.steps * arguments.accumulation,
    }


def step_tokens(rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> tuple[list[int], int]:
    """Useful tokens of each step, and those that the padded side computes in all steps."""
    lengths = [len(row["input_ids"]) for row in rows]
    per_step = arguments.batch * arguments.accumulation
    useful = [sum(lengths[i : i + per_step]) for i in range(0, len(lengths), per_step)]
    batches = [lengths[i : i + arguments.batch] for i in range(0, len(lengths), arguments.batch)]
    return useful, sum(len(batch) * max(batch) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dataset_path", default=str(DATA))
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps; the first is not counted")
    parser.add_argument("--batch", type=int, default=8, help="rows of a padded micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="padded micro-batches of a step")
    parser.add_argument("--src_length", type=int, default=512)
    parser.add_argument("--tgt_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument(
        "--group_by_length", action="store_true", help="rows of like length into one step, on both sides"
    )
    parser.add_argument(
        "--no_share_prefixes", action="store_true", help="compute the common system message in each row"
    )
    records.add_json(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from arriero.formats.download import resolve_model

    model = resolve_model(arguments.model)
    if arguments.side:
        import torch

        torch.set_num_threads(arguments.threads)
        rows = json.loads(Path(arguments.data).read_text())
        run = run_arriero if arguments.side == "arriero" else run_transformers
        values = run(model, rows, arguments)
        values["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(values))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.json"
        rows = encode(arguments, model)
        useful, padded = step_tokens(rows, arguments)
        data.write_text(json.dumps(rows))
        for _ in range(arguments.rounds):
            for side in SIDES:
                runs[side].append(run_side(__file__, sys.argv[1:], side, data, OMP_NUM_THREADS=str(arguments.threads)))
    for run in [*runs["arriero"], *runs["transformers"]]:
        run["speed"] = sum(useful[1:]) / sum(run["seconds"][1:])
    ratios = [a["speed"] / b["speed"] for a, b in zip(runs["arriero"], runs["transformers"], strict=True)]
    longest = max(len(row["input_ids"]) for row in rows)
    print(
        f"{date.today()}, {platform.machine()}, {arguments.threads} threads, torch {version('torch')}, "
        f"transformers {version('transformers')}, peft {version('peft')}, fp32\n"
        f"LoRA fine-tune (rank {RANK}) of {arguments.model} on {Path(arguments.dataset_path).name}, {arguments.steps} steps of "
        f"{arguments.batch * arguments.accumulation} rows, micro-batches of {arguments.batch} rows or "
        f"{arguments.batch * longest} tokens; of the padded tokens {100 * sum(useful) / padded:.0f} % are useful; "
        f"median of {arguments.rounds} rounds"
    )
    for side in SIDES:
        speed = statistics.median(run["speed"] for run in runs[side])
        memory = max(run["memory_gib"] for run in runs[side])
        first = runs[side][0]
        print(
            f"{side:14}{speed:8.1f} useful tok/s   {memory:5.2f} GiB   {first['micro_batches']} micro-batches   "
            f"loss {first['losses'][0]:.4f} -> {first['losses'][-1]:.4f}"
        )
    print(f"ratio {statistics.median(ratios):.2f} (of each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    what = f"LoRA on uneven rows, {sum(useful) / padded:.0%} of the padded tokens useful"
    if arguments.group_by_length:
        what += ", grouped by length"
    common: dict[str, Any] = {"peer_name": "transformers Trainer + PEFT", "threads": arguments.threads}
    speeds = ([run["speed"] for run in runs[side]] for side in SIDES)
    memory = ([run["memory_gib"] for run in runs[side]] for side in SIDES)
    told = [
        Record.of_rounds("packing", what, "useful tok/s", *speeds, **common),
        Record.of_costs("packing", f"{what}: peak memory", "GiB", *memory, **common),
    ]
    records.write(arguments.json, told)


if __name__ == "__main__":
    main()
