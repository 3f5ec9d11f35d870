"""LoRA as torchtune's own recipe trains it, and the same rows in arriero: useful tokens a second and memory, in turns.

The recipe is `lora_finetune_single_device`, unchanged, with what its configuration for Llama 3.2 1B says: all matrices of the
layers, padded batches, fused AdamW; here rank 8, fp32, on a CPU, with SmolLM2-135M. Its batches are 8 rows, 4 of them a step.
arriero's side is `packing.py`'s: the same token ids, the same rows in each step, micro-batches of as many tokens as a padded
one of theirs can have. Losses of both sides must agree. torchtune has an environment of its own, `.venv-torchtune`.

    make bench BENCH=torchtune_side ARGS="--install"      make the environment first (once; torch and 60 packages)
    make bench BENCH=torchtune_side ARGS="--steps 3 --rounds 2"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venv-torchtune"
PACKAGES = ("torch==2.13.0", "torchao==0.13.0", "torchtune==0.6.1")
RANK, ALPHA = 8, 16
BATCH, ACCUMULATION = 8, 4
LEARNING_RATE = 1e-4
LOSS_DIFFERENCE = (
    1e-3  # of the first step, whose weights are the same on both sides; torchtune's rotation is in fp32 as ours
)


class Rows:
    """What torchtune takes as a data set: the token ids of a file, in its order."""

    def __init__(self, _tokenizer: Any, path: str) -> None:
        self._rows = json.loads(Path(path).read_text())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        return {"tokens": self._rows[at]["input_ids"], "labels": self._rows[at]["hf_labels"]}  # it shifts them itself


class Padding:
    """What the recipe needs of a tokenizer when rows are token ids already."""

    pad_id = 2


class Clock:
    """torchtune's place for a step's figures."""

    times: list[float]
    losses: list[float]

    def __init__(self) -> None:
        self.times, self.losses = [], []

    def log_config(self, _config: Any) -> None: ...

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(float(values["loss"]))

    def close(self) -> None: ...


def settings(folder: Path, output: str, data: str, steps: int, longest: int) -> dict[str, Any]:
    """Of the recipe; the numbers of `recipes/configs/llama3_2/1B_lora_single_device.yaml` where nothing else is said above."""
    shape = json.loads((folder / "config.json").read_text())
    return {
        "output_dir": output,
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "vocab_size": shape["vocab_size"],
            "num_layers": shape["num_hidden_layers"],
            "num_heads": shape["num_attention_heads"],
            "num_kv_heads": shape["num_key_value_heads"],
            "embed_dim": shape["hidden_size"],
            "intermediate_dim": shape["intermediate_size"],
            "max_seq_len": longest,
            "norm_eps": shape["rms_norm_eps"],
            "rope_base": shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"],
            "scale_factor": 1,
            "lora_rank": RANK,
            "lora_alpha": ALPHA,
        },
        "tokenizer": {"_component_": "torchtune_side.Padding"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(folder),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": output,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "dataset": {"_component_": "torchtune_side.Rows", "path": data},
        "seed": 0,
        "shuffle": False,
        "batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps_per_epoch": steps,
        "epochs": 1,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": LEARNING_RATE,
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
            "num_cycles": 0,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "compile": False,
        "metric_logger": {"_component_": "torchtune_side.Clock"},
        "device": "cpu",
        "dtype": "fp32",
        "log_level": "WARNING",
    }


def run_torchtune(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe itself, in torchtune's environment."""
    import torch
    import torchtune  # type: ignore[import-not-found]
    from omegaconf import OmegaConf  # type: ignore[import-not-found]

    torch.set_num_threads(arguments.threads)
    # `recipes` refuses to be imported as a package
    path = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    longest = max(len(row["input_ids"]) for row in json.loads(Path(arguments.data).read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        told = settings(Path(arguments.checkpoint), scratch, arguments.data, arguments.steps, longest)
        config = OmegaConf.create(told)
        recipe = module.LoRAFinetuneRecipeSingleDevice(cfg=config)
        recipe.setup(cfg=config)
        recipe.save_checkpoint = lambda **_: None  # after training, and not what is measured
        start = time.perf_counter()
        recipe.train()
    clock = recipe._metric_logger
    ends = [start, *clock.times]
    return {"losses": clock.losses, "seconds": [b - a for a, b in pairwise(ends)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="make .venv-torchtune, and do nothing else")
    parser.add_argument("--json", type=Path, help="add what is found to this file, a JSON object a line")
    parser.add_argument("--side", choices=("torchtune",), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = run_torchtune(arguments)
        found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(found))
        return
    if arguments.install:
        from sides import make_environment

        make_environment(ENVIRONMENT, PACKAGES)
        return
    if not (ENVIRONMENT / "bin/python").is_file():
        raise SystemExit("torchtune is not installed: make bench BENCH=torchtune_side ARGS=--install")
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Rounds of both sides."""
    import packing
    import records
    from records import Record
    from sides import run_side

    from arriero.formats.download import resolve_model

    model = resolve_model(arguments.model)
    numbers = {"steps": arguments.steps, "batch": BATCH, "accumulation": ACCUMULATION, "threads": arguments.threads}
    options = [f"--{name}={value}" for name, value in numbers.items()]
    given = argparse.Namespace(
        **numbers, dataset_path=packing.DATA, src_length=512, tgt_length=256, group_by_length=False
    )
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.json"
        rows = packing.encode(given, model)
        data.write_text(json.dumps(rows))
        useful, padded = packing.step_tokens(rows, given)
        own = [f"--steps={arguments.steps}", f"--threads={arguments.threads}", f"--checkpoint={model}"]
        for _ in range(arguments.rounds):
            ours.append(run_side(str(HERE / "packing.py"), options, "arriero", data, **threads))
            theirs.append(run_side(__file__, own, "torchtune", data, python=ENVIRONMENT / "bin/python", **threads))
    first, other = ours[0]["losses"][0], theirs[0]["losses"][0]
    if abs(first - other) > LOSS_DIFFERENCE * other:
        raise SystemExit(f"the losses of the first step differ: {first} here, {other} in torchtune")
    for run in (*ours, *theirs):
        run["speed"] = sum(useful[1:]) / sum(run["seconds"][1 : arguments.steps])
    what = f"LoRA, torchtune's recipe, {sum(useful) / padded:.0%} of its padded tokens useful"
    more: dict[str, Any] = {"peer_name": PACKAGES[-1].replace("==", " "), "threads": arguments.threads}
    values = {key: [[run[key] for run in side] for side in (ours, theirs)] for key in ("speed", "memory_gib")}
    told = [
        Record.of_rounds("torchtune_side", what, "useful tok/s", *values["speed"], **more),
        Record.of_costs("torchtune_side", f"{what}: peak memory", "GiB", *values["memory_gib"], **more),
    ]
    records.show(told)
    print(f"loss of the first step {first:.4f} and {other:.4f}")
    records.write(arguments.json, told)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # the recipe finds the classes above by this module's name
    main()
