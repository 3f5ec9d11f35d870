"""Fine-tuning speed and memory, arriero beside the transformers Trainer (with PEFT for LoRA), in the same run.

Both sides train the same model on the same token ids, rows in the same order, same batch, learning rate and precision
(fp32), each in a process of its own; they take turns, so that a drift of the machine's speed hits both. Useful tokens are
those of the rows, padding not counted. The first `--skip` steps of each process are left out.

    make bench ARGS="--method lora --steps 6"
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
MODEL = "smollm2-135m-instruct"
QUESTIONS = str(Path(__file__).parents[1] / "src/arriero/assets/quickstart")


def encode(arguments: argparse.Namespace, model: Path) -> list[dict[str, list[int]]]:
    """The rows both sides train on; labels are shifted (ours), `hf_labels` are not (transformers shifts itself)."""
    from arriero.config.row_lengths import RowLengths
    from arriero.data.sft import IGNORE, encode_all
    from arriero.data.sources import load_samples
    from arriero.data.tokenizer import load_tokenizer

    samples = load_samples(arguments.dataset_path, None, "squad_qa", ["train"])["train"]
    count = arguments.steps * arguments.batch
    # spread over the file, so that neighbours are strangers; or, to share beginnings, in the file's own order
    stride = 1 if arguments.share_prefixes else max(1, len(samples) // count)
    examples, report = encode_all(samples[::stride][:count], load_tokenizer(model), RowLengths(1024, 32))
    print(f"data: {report}")
    rows = []
    for example in examples:
        hf_labels = [IGNORE] + example.labels[:-1]
        ids, labels = example.input_ids, example.labels
        if arguments.full_rows:  # every row cut or repeated to one length, every position learned: no padding anywhere
            length = arguments.full_rows
            ids = (ids * (length // len(ids) + 1))[:length]
            labels, hf_labels = ids[1:] + [IGNORE], ids
        rows.append({"input_ids": ids, "labels": labels, "hf_labels": hf_labels})
    return rows


def run_arriero(model: Path, rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    from arriero_side import train

    from arriero.adapters.lora import LoRAConfig
    from arriero.data.order import StepOrder

    records = train(
        model,
        rows,
        StepOrder(len(rows), arguments.batch, 1, 0, shuffle=False),
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        adapter=None if arguments.method == "full" else LoRAConfig(rank=8, alpha=16),
        quantize_base="nf4" if arguments.method == "qlora" else None,
        recompute=arguments.recompute,
        compile_layers=arguments.compile,
        share_prefixes=arguments.share_prefixes,
    )
    return {
        "losses": [r.loss for r in records],
        "tokens": [r.tokens for r in records],
        "seconds": [r.seconds for r in records],
        "flops": [r.flops for r in records],
    }


def run_transformers(model: Path, rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers_side import train, with_lora

    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if arguments.method == "qlora":
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)
    if arguments.method == "qlora":
        from peft import prepare_model_for_kbit_training

        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=arguments.recompute)
    if arguments.method != "full":
        network = with_lora(network)
    clock = train(
        network,
        rows,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        recompute=arguments.recompute,
        compile_model=arguments.compile,
    )
    sizes = [len(row["input_ids"]) for row in rows]
    tokens = [sum(sizes[i : i + arguments.batch]) for i in range(0, len(rows), arguments.batch)]
    return {"losses": clock.losses, "tokens": tokens, "seconds": clock.seconds}


def measure(side: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    values = run_side(__file__, arguments.raw, side, data)
    values["speed"] = sum(values["tokens"][arguments.skip :]) / sum(values["seconds"][arguments.skip :])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dataset_path", default=QUESTIONS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--full_rows", type=int, default=0, help="rows of exactly this length, all positions learned")
    parser.add_argument("--share_prefixes", action="store_true", help="rows of one passage side by side; ours shares")
    parser.add_argument("--recompute", action="store_true", help="activations are computed again, layer by layer")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on both sides")
    parser.add_argument("--skip", type=int, default=1, help="first steps that are not counted")
    records.add_json(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.raw = sys.argv[1:]
    from arriero.formats.download import resolve_model

    model = resolve_model(arguments.model)
    if arguments.side:
        rows = json.loads(Path(arguments.data).read_text())
        run = run_arriero if arguments.side == "arriero" else run_transformers
        values = run(model, rows, arguments)
        values["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(values))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.json"
        data.write_text(json.dumps(encode(arguments, model)))
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                runs[side].append(measure(side, data, arguments))
    ours, theirs = runs["arriero"], runs["transformers"]
    ratios = [a["speed"] / b["speed"] for a, b in zip(ours, theirs, strict=True)]
    import torch

    print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {version('torch')}, "
        f"transformers {version('transformers')}, peft {version('peft')}, fp32\n"
        f"{arguments.method} fine-tune of {arguments.model}, {arguments.steps} steps of {arguments.batch} rows"
        f"{f' of {arguments.full_rows} tokens, all learned' if arguments.full_rows else ''}, "
        f"median of {arguments.rounds} rounds"
    )
    for side in SIDES:
        speed = statistics.median(r["speed"] for r in runs[side])
        memory = max(r["memory_gib"] for r in runs[side])
        losses = runs[side][0]["losses"]
        print(f"{side:14}{speed:8.1f} useful tok/s   {memory:5.2f} GiB   loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"ratio {statistics.median(ratios):.2f} (of each round: {', '.join(f'{r:.2f}' for r in ratios)})")
    records.write(arguments.json, found(runs, arguments, torch.get_num_threads()))


def found(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace, threads: int) -> list[Record]:
    """Speed and memory, for `--json`."""
    what = f"{arguments.method} fine-tune of 135M, real rows"
    if arguments.full_rows:
        what = f"{arguments.method} training step of 135M, full rows of {arguments.full_rows}"
    if arguments.model != MODEL:
        what = what.replace("135M", Path(arguments.model).name)
    what += "".join(f", {word}" for word in ("recompute", "compile") if getattr(arguments, word))
    peer = "transformers Trainer" + {"full": "", "lora": " + PEFT", "qlora": " + PEFT + bitsandbytes"}[arguments.method]
    ours, theirs = runs["arriero"], runs["transformers"]
    speeds = ([run["speed"] for run in side] for side in (ours, theirs))
    memory = ([run["memory_gib"] for run in side] for side in (ours, theirs))
    common: dict[str, Any] = {"peer_name": peer, "threads": threads}
    return [
        Record.of_rounds("train", what, "useful tok/s", *speeds, **common),
        Record.of_costs("train", f"{what}: peak memory", "GiB", *memory, **common),
    ]


if __name__ == "__main__":
    main()
