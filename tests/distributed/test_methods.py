"""Every method of fine-tuning on layouts of processes, against one process: loss, gradient norm and what is written.

The runs are those of `arriero finetune`, started inside processes that stay. Run as a program, this file is one of them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main as arriero
from arriero.config.precision import PrecisionOptions
from arriero.formats.hf import save_model
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.callbacks.records import LossPlot
from arriero.training.trainer import StepRecord, Trainer

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import append, read_lines, run_ranks

STEPS, MICRO_BATCHES, LIMIT, ONE = 3, 2, 1e-5, "one process"
Cell = tuple[str, str]  # method, kind of layout
# 64 weights in a row share a scale of nf4, also in half a row
MODEL = {
    "model_type": "llama",
    "vocab_size": 2051,  # no number of processes divides it
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LORA, PREFIX = ["--lora", "--lora_rank", "3"], ["--prefix_tuning", "--num_prefix_tokens", "5"]
DPO = ["--preference", "dpo", "--dataset_path", "pairs.jsonl"]
# one more than the model has spare rows for
TOKENS = ["--add_tokens", "nobler,slings", "--add_special_tokens", "<|a|>,<|b|>"]
EVALUATION = ["--do_eval", "--evaluation_strategy", "steps", "--eval_steps", "1"]
METHODS: dict[str, list[str]] = {
    "full": [],
    "LoRA": LORA,
    "rsLoRA": [*LORA, "--lora_rslora"],
    "DoRA": [*LORA, "--lora_dora"],
    "LoRA+": [*LORA, "--lora_plus_scale", "4"],
    "PiSSA": [*LORA, "--lora_init", "pissa"],
    "QLoRA nf4": [*LORA, "--quantize_base", "nf4"],
    "QLoRA int8": [*LORA, "--quantize_base", "int8"],
    "prefix": PREFIX,
    "prefix, projection": [*PREFIX, "--prefix_projection"],
    "QAT A8W8": ["--qat", "--qat_type", "A8W8"],
    "QAT W4": ["--qat", "--qat_type", "W4"],
    "QAT A8W4": ["--qat", "--qat_type", "A8W4"],
    "QAT A8W8, moving average": ["--qat", "--qat_type", "A8W8", "--qat_activation", "moving_average"],
    "LoRA, QAT A8W8": [*LORA, "--qat", "--qat_type", "A8W8"],
    "freeze": ["--freeze", "model.embed_tokens,model.layers.[0-2],*.norm"],
    "NEFTune": ["--neftune_noise_alpha", "15"],
    "LoRA, NEFTune": [*LORA, "--neftune_noise_alpha", "15"],
    "DPO": DPO,
    "LoRA, DPO": [*LORA, *DPO],
    "new tokens, tied": ["--model_name_or_path", "tied", *TOKENS, "--pad_vocab_to_multiple_of", "64"],
    "new tokens": TOKENS,
    "prefix, DPO": [*PREFIX, *DPO],
    "rows by tokens": ["--max_tokens_per_batch", "90"],
    # no evaluation is better by so much: it ends after the second
    "early stopping": [*EVALUATION, "--early_stopping_patience", "1", "--early_stopping_threshold", "10"],
}
# Where several processes see other rows, or score others.
DATA_PARALLEL = ("rows by tokens", "early stopping")
TP, PP = ["--tensor_parallel_degree", "2"], ["--pipeline_parallel_degree", "2"]
# name: processes, data-parallel ones, flags
KINDS: dict[str, tuple[int, int, list[str]]] = {
    "fsdp2": (2, 2, ["--sharding", "stage3"]),
    "tp2": (2, 1, TP),
    "pp2": (2, 1, PP),
    "tp2 x pp2": (4, 1, [*TP, *PP]),
}


def prepare(folder: Path) -> None:
    """A model and rows of uneven lengths."""
    config = LlamaConfig.from_dict(MODEL)
    model = LlamaForCausalLM(config)
    model.init_weights(3)
    save_model(model, config, folder / "model", extra_files=tiny_tokenizer_files())
    config = replace(config, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.init_weights(3)
    save_model(model, config, folder / "tied", extra_files=tiny_tokenizer_files())
    words = "to be or not that is the question whether nobler in mind suffer slings and arrows".split()  # noqa: SIM905
    generator = np.random.default_rng(5)

    def text(least: int, most: int) -> str:
        return " ".join(generator.choice(words, int(generator.integers(least, most))))

    rows = [{"src": text(3, 20), "tgt": text(2, 12)} for _ in range(40)]
    pairs = [{"prompt": text(3, 20), "chosen": text(2, 12), "rejected": text(2, 12)} for _ in range(40)]
    for name, made in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def run(method: str, output: Path, flags: list[str], accumulation: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step.

    Raises:
        RuntimeError: with the exit code, if the command was refused or failed.
    """
    records: list[StepRecord] = []
    step = Trainer.step

    def watched(trainer: Trainer) -> StepRecord:
        records.append(step(trainer))
        return records[-1]

    own = METHODS[method]
    # An input between two integers goes either way by its last bit. In fp32 the sums of tensor parallelism differ in that bit
    # and a loss by 1e-3 after some steps, as that of one process does when one weight changes by its last bit.
    wide = "float64" if "A8" in method else "float32"
    data = [] if "--dataset_path" in own else ["--dataset_path", "rows.jsonl"]
    model = [] if "--model_name_or_path" in own else ["--model_name_or_path", "model"]
    with (
        mock.patch.object(Trainer, "step", watched),
        mock.patch("arriero.training.run.stop"),
        mock.patch.object(LossPlot, "on_train_end"),  # half of the time
        mock.patch.object(PrecisionOptions, "weight_dtype", wide),
    ):
        code = arriero(
            [
                *("finetune", *model, *data, *own, *flags, "--output_dir", str(output)),
                *("--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--learning_rate", "5e-3"),
                *("--gradient_accumulation_steps", str(accumulation), "--src_length", "64", "--tgt_length", "32"),
                *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "--device", "cpu"),
                *("--max_grad_norm", "0.5", "--share_prefixes", "no", "--overwrite_output_dir"),
                # with the usual 1e-8, the sign of gradients near zero decides: 1e-7 apart becomes 4e-2
                *("--adam_epsilon", "1e-5"),
            ]
        )
    if code:
        raise RuntimeError(f"exit code {code}")
    return [(record.loss, record.grad_norm) for record in records]


def main(folder: Path, cells: list[Cell]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    kinds = [name for name, (size, _, _) in KINDS.items() if size == world]
    todo = [(method, kind) for method, kind in cells if kind in kinds]
    if world == 1:
        todo = [(method, ONE) for method in dict.fromkeys(method for method, _ in cells)]
    for method, kind in todo:
        _, data_parallel, flags = KINDS.get(kind, (1, 1, []))
        records, error = [], ""
        try:
            records = run(method, Path(kind) / method, flags, MICRO_BATCHES // data_parallel)
        except RuntimeError as failure:
            error = str(failure)
        if rank == 0:
            append(Path("results.jsonl"), {"kind": kind, "method": method, "records": records, "error": error})


# What they found


def apart(one: Any, other: Any) -> float:
    """The greatest difference as a part of the greatest magnitude."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return float((a - b).abs().max() / b.abs().max())


def compare(folder: Path, cells: list[Cell]) -> list[dict[str, Any]]:
    """Of every cell the differences from one process; the runs are made here."""
    prepare(folder)
    (folder / "cells.json").write_text(json.dumps(cells))
    for world in (1, 2, 4):
        run_ranks(world, Path(__file__), str(folder), timeout=1500)
    lines = read_lines(folder / "results.jsonl")
    truth = {line["method"]: line for line in lines if line["kind"] == ONE}
    found = []
    for line in lines:
        if line["kind"] == ONE:
            continue
        one = truth[line["method"]]
        result = {"kind": line["kind"], "method": line["method"], "error": line["error"] or one["error"]}
        result["steps"] = len(line["records"])
        if not result["error"]:
            for number, what in enumerate(("loss", "norm")):
                pairs = zip(line["records"], one["records"], strict=True)
                result[what] = max(abs(a[number] - b[number]) / abs(b[number]) for a, b in pairs)
            written = {path.name for path in (folder / ONE / line["method"]).glob("*.safetensors")}
            tensors, whole = (
                {name: value for file in sorted(written) for name, value in load_file(at / file).items()}
                for at in (folder / line["kind"] / line["method"], folder / ONE / line["method"])
            )
            if tensors.keys() != whole.keys() or not whole:
                result["error"] = f"other tensors are written: {sorted(tensors.keys() ^ whole.keys())[:4]}"
            else:
                result["weights"] = max(apart(tensors[name], whole[name]) for name in whole)
        found.append(result)
    return found


def check(cells: list[Cell], folder: Path) -> None:
    found = compare(folder, cells)
    assert sorted((line["method"], line["kind"]) for line in found) == sorted(cells)
    assert not [line for line in found if line["error"] or not max(line["loss"], line["norm"]) <= LIMIT]
    assert all(line["steps"] == (2 if line["method"] == "early stopping" else STEPS) for line in found)


@pytest.mark.timeout(600)
def test_every_method_on_one_kind_of_layout(tmp_path: Path) -> None:
    kinds = list(KINDS)
    cells = [(method, kinds[number % len(kinds)]) for number, method in enumerate(METHODS)]
    check([(method, "fsdp2" if method in DATA_PARALLEL else kind) for method, kind in cells], tmp_path)


@pytest.mark.peers
@pytest.mark.timeout(3600)
def test_every_method_on_every_kind_of_layout(tmp_path: Path) -> None:
    check([(method, kind) for method in METHODS for kind in KINDS], tmp_path)


if __name__ == "__main__":
    at = Path(sys.argv[1])
    main(at, [tuple(cell) for cell in json.loads((at / "cells.json").read_text())])
