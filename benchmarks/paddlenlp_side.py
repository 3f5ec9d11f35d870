"""A fine-tuning of the same rows by PaddleNLP's own model and Trainer, beside arriero: useful tokens a second and memory.

PaddleNLP is where this project's commands come from. Its side loads the checkpoint that `arriero convert --to paddle` writes,
so the losses of the first step must agree: the same weights, the same token ids. This PaddleNLP knows no tied head, so on both
sides the head is a matrix of its own. Padded batches of 8 rows, AdamW, fp32, on a
CPU; `--lora` with PaddleNLP's own LoRA (rank 8) on all matrices of the layers. It has an environment of its own,
`.venv-paddlenlp`, of the last versions that run together there.

    make bench BENCH=paddlenlp_side ARGS="--install"      make the environment first (once)
    make bench BENCH=paddlenlp_side ARGS="--steps 4 --rounds 2"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venv-paddlenlp"
PACKAGES = (
    "paddlepaddle==3.3.1",
    "paddlenlp==2.8.1",
    # newer ones lack what this PaddleNLP imports
    "huggingface_hub<0.26",
    "aistudio-sdk<0.3",
    "datasets<3.3",
    "pyarrow<18",
    "numpy<2",
)
BATCH, RANK, ALPHA, PAD_ID = 8, 8, 16, 2
LEARNING_RATE = 1e-4
LOSS_DIFFERENCE = 1e-3  # of the first step, whose weights are the same on both sides


def run_paddlenlp(arguments: argparse.Namespace) -> dict[str, Any]:
    """PaddleNLP's Trainer, in its environment."""
    import numpy as np
    import paddle  # type: ignore[import-not-found]
    from paddlenlp.peft import LoRAConfig, LoRAModel  # type: ignore[import-not-found]
    from paddlenlp.trainer import Trainer, TrainerCallback, TrainingArguments  # type: ignore[import-not-found]
    from paddlenlp.transformers import LlamaForCausalLM  # type: ignore[import-not-found]
    from sides import Clock

    rows = json.loads(Path(arguments.data).read_text())

    class StepClock(Clock, TrainerCallback):  # type: ignore[misc]
        """For PaddleNLP's Trainer."""

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self) -> Any:
            return paddle.io.BatchSampler(rows, batch_size=BATCH, shuffle=False)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)

        def pad(key: str, value: int) -> Any:
            return np.array([row[key] + [value] * (longest - len(row[key])) for row in batch], np.int64)

        mask = np.array([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
        # this model wants labels that are shifted already
        return {"input_ids": pad("input_ids", PAD_ID), "labels": pad("labels", -100), "attention_mask": mask}

    model = LlamaForCausalLM.from_pretrained(arguments.checkpoint, dtype="float32")
    if arguments.lora:
        names = [f".*{name}_proj.*" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        config = LoRAConfig(target_modules=names, r=RANK, lora_alpha=ALPHA, dtype="float32")
        model = LoRAModel(model, config)
        model.mark_only_lora_as_trainable()
    clock = StepClock()
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=BATCH, max_steps=arguments.steps, device="cpu",
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, logging_steps=1,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False, report_to=[], do_train=True,
        )  # fmt: skip
        trainer = InOrder(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[clock])
        trainer.train()
    return {"losses": clock.losses, "seconds": clock.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="make .venv-paddlenlp, and do nothing else")
    parser.add_argument("--json", type=Path, help="add what is found to this file, a JSON object a line")
    parser.add_argument("--side", choices=("paddlenlp",), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = run_paddlenlp(arguments)
        found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found))
        return
    if arguments.install:
        from sides import make_environment

        make_environment(ENVIRONMENT, PACKAGES)
        return
    if not (ENVIRONMENT / "bin/python").is_file():
        raise SystemExit("PaddleNLP is not installed: make bench BENCH=paddlenlp_side ARGS=--install")
    compare(arguments)


def untie(model: Path, folder: Path) -> Path:
    """The model with its embedding once more as the head."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def compare(arguments: argparse.Namespace) -> None:
    """Rounds of both sides."""
    import records
    import train
    from records import Record
    from sides import run_side

    from arriero.formats.download import resolve_model

    model = resolve_model(arguments.model)
    method = "lora" if arguments.lora else "full"
    options = [
        f"--steps={arguments.steps}",
        f"--batch={BATCH}",
        f"--method={method}",
        f"--learning_rate={LEARNING_RATE}",
    ]
    given = argparse.Namespace(
        steps=arguments.steps, batch=BATCH, full_rows=0, share_prefixes=False, dataset_path=train.QUESTIONS
    )
    threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        data, checkpoint = Path(scratch) / "rows.json", Path(scratch) / "paddle"
        rows = train.encode(given, model)
        data.write_text(json.dumps(rows))
        untied = untie(model, Path(scratch) / "untied")
        convert = [sys.executable, "-m", "arriero", "convert", str(untied), str(checkpoint), "--to", "paddle"]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        numbers = {"steps": arguments.steps, "batch": BATCH, "method": method, "learning_rate": LEARNING_RATE}
        options = [f"--{name}={value}" for name, value in (numbers | {"model": untied}).items()]
        own = [f"--steps={arguments.steps}", f"--checkpoint={checkpoint}", *(["--lora"] if arguments.lora else [])]
        for _ in range(arguments.rounds):
            ours.append(run_side(str(HERE / "train.py"), options, "arriero", data, **threads))
            theirs.append(run_side(__file__, own, "paddlenlp", data, python=ENVIRONMENT / "bin/python", **threads))
    first, other = ours[0]["losses"][0], theirs[0]["losses"][0]
    if abs(first - other) > LOSS_DIFFERENCE * other:
        raise SystemExit(f"the losses of the first step differ: {first} here, {other} in PaddleNLP")
    for run in (*ours, *theirs):
        run["speed"] = sum(ours[0]["tokens"][1 : arguments.steps]) / sum(run["seconds"][1 : arguments.steps])
    what = f"{method} fine-tune of 135M and a head of its own, real rows, PaddleNLP's Trainer"
    more: dict[str, Any] = {"peer_name": PACKAGES[1].replace("==", " "), "threads": arguments.threads}
    values = {key: [[run[key] for run in side] for side in (ours, theirs)] for key in ("speed", "memory_gib")}
    told = [
        Record.of_rounds("paddlenlp_side", what, "useful tok/s", *values["speed"], **more),
        Record.of_costs("paddlenlp_side", f"{what}: peak memory", "GiB", *values["memory_gib"], **more),
    ]
    records.show(told)
    print(f"loss of the first step {first:.4f} and {other:.4f}")
    records.write(arguments.json, told)


if __name__ == "__main__":
    main()
