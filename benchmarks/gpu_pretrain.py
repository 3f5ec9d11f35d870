"""Training speed and memory of a 1.3B Llama on one GPU, or on the GPUs of one launch: tokens/s, MFU, peak memory.

    make bench BENCH=gpu_pretrain                                          every case on one GPU, each in its own process
    make bench BENCH=gpu_pretrain ARGS="--cases O2 O2+compile --batch 16"  some of them
    make bench BENCH=gpu_pretrain ARGS="--cases O2+lora+recompute --model configs/models/llama-3-8b --sequence 4096 --batch 1"
    make bench BENCH=gpu_pretrain ARGS="--device cpu --tiny"               the same code on a laptop, for a check
    .venv/bin/torchrun --standalone --nproc_per_node 8 benchmarks/gpu_pretrain.py --cases O1+compile --sharding stage2

Random weights, synthetic tokens, the product's own trainer, AdamW. A case is a precision (fp32, O1, O2; half precision is
bf16), with any of "+fp8" (products of the layers' matrices in 8-bit floats), "+compile", "+recompute" and "+lora" (rank 16 on
all matrices, the rest frozen). MFU is against the peak of bf16, of fp8 too. The first steps are left out. A row of a Markdown
table is printed for each case, and all figures are added to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.lora import initial_values as adapter_values
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OPTIMIZERS, OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.data.corpus.dataset import CorpusSample
from arriero.data.steps import DataShare, PretrainingSteps
from arriero.engine.loading import LoadedModel
from arriero.formats.parts import Placement
from arriero.models.config import LlamaConfig
from arriero.models.fp8_linear import check_device
from arriero.models.initialization import initial_values
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel import parallelize
from arriero.parallel.compilation import apply_compile
from arriero.parallel.processes import launched_size, start, stop
from arriero.training.flops import peak_flops
from arriero.training.run import RunOptions, build_trainer, share_out
from arriero.training.weights import FullWeights

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "O1": {"bf16": True, "fp16_opt_level": "O1"},
    "O2": {"bf16": True, "fp16_opt_level": "O2"},
}
SWITCHES = ("fp8", "compile", "recompute", "lora")
ADAPTER = LoRAConfig(rank=16, alpha=32)
CASES = [level + extra for level in ("O1", "O2") for extra in ("", "+compile", "+recompute", "+compile+recompute")]
MODEL = Path(__file__).parents[1] / "configs/models/llama-1.3b"
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256}
HEADING = (
    "| machine | case | batch x accumulation x row | tokens/s a device | MFU | peak memory, GiB | ms a step |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True)
class Noise:
    """Samples of random tokens, all of them learned."""

    samples_per_epoch: int
    length: int
    vocabulary: int

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, index: int) -> CorpusSample:
        ids = np.random.default_rng(index).integers(0, self.vocabulary, self.length + 1)
        return CorpusSample(ids[:-1], ids[1:], (self.length,))

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": self.samples_per_epoch}


def options(case: str, arguments: argparse.Namespace) -> RunOptions:
    level, *switches = case.split("+")
    if level not in PRECISIONS or not set(switches) <= set(SWITCHES):
        raise SystemExit(f"{case}: a case is one of {', '.join(PRECISIONS)}, and any of +{', +'.join(SWITCHES)}")
    return RunOptions(
        model=ModelOptions(model_name_or_path=str(arguments.model), device=arguments.device),
        optimization=OptimizationOptions(
            optim=arguments.optim,
            max_steps=arguments.warmup + arguments.steps,
            learning_rate=1e-4,
            per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=arguments.accumulation,
        ),
        precision=PrecisionOptions(
            **PRECISIONS[level],
            fp8="fp8" in switches,
            torch_compile="compile" in switches,
            recompute="recompute" in switches,
        ),
        parallel=ParallelOptions(
            tensor_parallel_degree=arguments.tensor_parallel_degree,
            pipeline_parallel_degree=arguments.pipeline_parallel_degree,
            sharding=arguments.sharding,
        ),
        checkpoint=CheckpointOptions(output_dir=tempfile.gettempdir()),
        logging=LoggingOptions(),
    )


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, in this process or in all of the launch, and give the figures."""
    chosen = options(case, arguments)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    config = LlamaConfig.from_file(arguments.model)
    if arguments.tiny:
        config = LlamaConfig.from_dict({**config.to_dict(), **TINY})
    if chosen.precision.fp8_products:
        check_device(device)
    processes = start(chosen.parallel.layout(launched_size()), device)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weight_dtype = getattr(torch, chosen.precision.weight_dtype)
    model.to(weight_dtype)
    if "lora" in case.split("+"):
        apply_lora(model, ADAPTER, fresh=False)
    loaded = LoadedModel(model, None, arguments.model, device)  # type: ignore[arg-type]  # no text here
    parallelize.apply_compile = partial(apply_compile, backend=arguments.backend)  # type: ignore[attr-defined]

    def values(name: str, where: Placement) -> torch.Tensor:
        if ".lora_" in name:
            return adapter_values(name, where.box, where.shape, 0)
        if len(where.shape) < 2:
            return initial_values(name, where.box, where.shape, config, 0)
        # on the device: a processor draws the numbers of an 8B model for minutes
        drawn = torch.empty(where.size, dtype=weight_dtype, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return drawn.normal_(0.0, config.initializer_range, generator=generator)

    with contextlib.redirect_stdout(None):
        share_out(loaded, chosen, processes, values, arguments.sequence)
    share = DataShare(processes.data_rank, processes.layout.data)
    steps = arguments.warmup + arguments.steps
    rows = steps * arguments.batch * arguments.accumulation * share.size
    data: Any = Noise(rows, arguments.sequence, config.vocab_size)
    trainer = build_trainer(
        chosen,
        model,
        PretrainingSteps(data, arguments.batch, arguments.accumulation, share=share),
        FullWeights(model, arguments.model),
        Path(tempfile.gettempdir()),
        device,
        [],
        processes,
    )
    model.train()
    losses = [trainer.step().loss for _ in range(arguments.warmup)]
    _synchronize(device, reset=True)
    began, records, seconds = time.perf_counter(), [], []
    for _ in range(arguments.steps):
        at = time.perf_counter()
        records.append(trainer.step())
        _synchronize(device)
        seconds.append(time.perf_counter() - at)
    taken = time.perf_counter() - began
    peak, source = peak_flops(device, trainer.precision.dtype)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _host_peak()
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _host_peak()
    result = {
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "case": case,
        "layout": str(processes.layout),
        "processes": processes.size,
        "parameters": sum(np.prod(shape) for shape in _shapes(model).values()).item(),
        "optimizer": arguments.optim,
        "batch": arguments.batch,
        "accumulation": arguments.accumulation,
        "sequence": arguments.sequence,
        "tokens_per_second": sum(record.tokens for record in records) / taken,
        "model_flops_utilization": sum(record.flops for record in records) / taken / peak / processes.size,
        "peak_flops": peak,
        "peak_flops_from": source,
        "memory_bytes": int(processes.max([float(memory)])[0]),
        "memory_reserved_bytes": int(processes.max([float(reserved)])[0]),
        "step_seconds": statistics.median(seconds),
        "seconds": seconds,
        "losses": [*losses, *(record.loss for record in records)],
        "first": processes.first,
    }
    stop(processes)
    return result


def _shapes(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    parallel = getattr(model, "parallel", None)
    return parallel.shapes if parallel is not None else {n: tuple(p.shape) for n, p in model.named_parameters()}


def _synchronize(device: torch.device, *, reset: bool = False) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(found: dict[str, Any]) -> str:
    devices = (
        f"{found['processes']} x {found['machine']}, {found['layout']}" if found["processes"] > 1 else found["machine"]
    )
    speed = found["tokens_per_second"] / found["processes"]
    return (
        f"| {devices} | {found['case']} | {found['batch']} x {found['accumulation']} x {found['sequence']:,} | {speed:,.0f} "
        f"| {found['model_flops_utilization']:.1%} | {found['memory_bytes'] / 2**30:.1f} "
        f"| {found['step_seconds'] * 1e3:,.0f} |"
    )


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers and rows of 64 tokens")
    parser.add_argument("--sequence", type=int, help="tokens of a row (2048)")
    parser.add_argument("--batch", type=int, help="rows of a micro-batch (8)")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are left out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optim", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no compiler")
    parser.add_argument("--tensor_parallel_degree", type=int, default=1)
    parser.add_argument("--pipeline_parallel_degree", type=int, default=1)
    parser.add_argument("--sharding", nargs="+", default=[], help="stage1, stage2 or stage3, offload")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_pretrain.jsonl"), help="JSON lines are added to it"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.sequence = arguments.sequence or (64 if arguments.tiny else 2048)
    arguments.batch = arguments.batch or (2 if arguments.tiny else 8)
    return arguments


def main(given: list[str]) -> int:
    arguments = parse(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: --device cpu --tiny checks the program", file=sys.stderr)
        return 2
    if arguments.here or launched_size() > 1:
        if len(arguments.cases) > 1:
            print("several processes measure one case at a time: --cases O1", file=sys.stderr)
            return 2
        found = measure(arguments.cases[0], arguments)
        if found.pop("first"):
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(row(found), flush=True)
        return 0
    print(HEADING, flush=True)
    failed = 0
    for case in arguments.cases:  # each from a clean device
        command = [sys.executable, __file__, *given, "--cases", case, "--here"]
        failed += subprocess.run(command, check=False).returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
