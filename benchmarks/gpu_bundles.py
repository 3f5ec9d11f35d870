"""Bundles on one GPU: what torch and aoti bundles answer a second, beside the engine's own runner of the same weights.

    python benchmarks/gpu_bundles.py                                    a 135M and a 1.3B Llama, bf16
    python benchmarks/gpu_bundles.py --models configs/models/llama-135m
    python benchmarks/gpu_bundles.py --device cpu --tiny                the same code on a laptop, for a check

Random weights; prompts of random tokens, answers of one length, all at once; medians of five rounds. A row of a Markdown table
is printed for each, and all figures are added to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_generate
import numpy as np
import torch

from arriero.config.model import device_name
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.benchmark.rates import measure
from arriero.engine.engine import Engine
from arriero.engine.machine_peak import machine_name
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import ArrieroError
from arriero.export.aoti_export import export_aoti
from arriero.export.bundle import Bundle
from arriero.export.kinds import open_runner
from arriero.export.torch_export import TorchOptions, export_torch
from arriero.formats.download import resolve_model
from arriero.formats.hf import save_model
from arriero.models.config import LlamaConfig
from arriero.models.presets import TINY_RANDOM_LLAMA

MODELS = [Path(__file__).parents[1] / f"configs/models/{name}" for name in ("llama-135m", "llama-1.3b")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXPORTERS = {"torch": export_torch, "aoti": export_aoti}
HEADING = (
    "| machine | model | runs in | prompts | prompt tok/s | answer tok/s | export s | open s | largest error of a logit |\n"
    "| --- | --- | --- | ---: |" + " ---: |" * 5
)


def rates(runner: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of 1 and of 8 prompts."""
    tokenizer = load_tokenizer(
        resolve_model(TINY_RANDOM_LLAMA)
    )  # the engine asks for one; it makes no text of these answers
    for batch in (1, 8):
        drawn = np.random.default_rng(batch).integers(0, runner.vocab_size, (batch, arguments.prompt)).tolist()
        found = measure(
            Engine(runner, tokenizer, max_running=batch), drawn, SamplingParams(max_new_tokens=arguments.new)
        )
        yield {"prompts": batch, "prompt_rate": found.prompt_rate, "answer_rate": found.answer_rate}


def cases(path: Path, arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """All figures of a model."""
    device, dtype = torch.device(device_name(arguments.device)), DTYPES[arguments.weights]
    config = LlamaConfig.from_file(path)
    if arguments.tiny:
        config = LlamaConfig.from_dict({**config.to_dict(), **gpu_generate.TINY})
    model = gpu_generate.random_model(config, dtype, device)
    save_model(model, config, folder / "hf")
    runner = TorchRunner(model, useful_tokens=16 * (arguments.prompt + arguments.new))
    for found in rates(runner, arguments):
        yield {"model": path.name, "kind": "engine", **found}
    del model, runner
    context = min(config.max_position_embeddings, 2 * (arguments.prompt + arguments.new))
    for kind in arguments.kinds:
        began = time.perf_counter()
        options = TorchOptions(arguments.weights, context, device.type)
        try:
            bundle: Bundle = EXPORTERS[kind](folder / "hf", folder / kind, options)
        except ArrieroError as error:
            print(f"{path.name}: no {kind} bundle: {error}", file=sys.stderr)
            continue
        exported = time.perf_counter()
        opened = open_runner(bundle, slots=8)
        seconds = {"export_seconds": exported - began, "open_seconds": time.perf_counter() - exported}
        for found in rates(opened, arguments):
            yield {"model": path.name, "kind": kind, **found, **seconds, "check": dict(bundle.manifest.check)}
        del opened


def row(found: dict[str, Any]) -> str:
    cells = [found["machine"], f"{found['model']}, {found['weights']}", found["kind"], str(found["prompts"])]
    cells += [f"{found['prompt_rate']:,.0f}", f"{found['answer_rate']:,.0f}"]
    if "check" in found:
        cells += [f"{found['export_seconds']:.0f}", f"{found['open_seconds']:.1f}"]
        cells += [f"{found['check']['largest_difference']:.2g} of {found['check']['largest_logit']:.3g}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(cells)} |"


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=MODELS, help="folders with a config.json")
    parser.add_argument("--kinds", nargs="+", default=list(EXPORTERS), choices=list(EXPORTERS))
    parser.add_argument("--weights", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="models of two small layers")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (128)")
    parser.add_argument("--new", type=int, help="tokens of an answer (256)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_bundles.jsonl"), help="JSON lines are added to it"
    )
    arguments = parser.parse_args(given)
    arguments.prompt = arguments.prompt or (16 if arguments.tiny else 128)
    arguments.new = arguments.new or (8 if arguments.tiny else 256)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: --device cpu --tiny checks the program", file=sys.stderr)
        return 2
    print(HEADING, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    common = {
        "date": str(date.today()),
        "machine": machine_name(torch.device(arguments.device)),
        "torch": torch.__version__,
        "weights": arguments.weights,
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new,
    }
    for path in arguments.models:
        with TemporaryDirectory(prefix="arriero-bench-") as folder:
            for found in cases(path, arguments, Path(folder)):
                print(row(common | found), flush=True)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(common | found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
