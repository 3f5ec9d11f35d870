"""Generation on one GPU: a model of the size of Llama 3 8B, random weights, bf16, through the engine.

    python benchmarks/gpu_generate.py                                   all cases
    python benchmarks/gpu_generate.py --cases batch_1                   one of them
    python benchmarks/gpu_generate.py --eager                           without CUDA graphs, to see what they give
    python benchmarks/gpu_generate.py --device cpu --tiny               the same code on a laptop, for a check

The cases are those of published figures: a single stream, for its share of the memory's bandwidth (gpt-fast); 128 requests
of 32 tokens in and 2,048 out (torchao with vLLM); 256 requests of 100 to 1,024 tokens in and out, evenly distributed
(nano-vllm). Prompts are random tokens and no answer ends early. A row of a Markdown table is printed for each case, and all
figures are added to a file of JSON lines. Peaks are measured: a matrix product in the weights' type, and a sum over memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from arriero.config.model import device_name
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.benchmark.measured import Job
from arriero.engine.benchmark.record import Peak
from arriero.engine.benchmark.rounds import measure
from arriero.engine.benchmark.work_cost import WorkCost
from arriero.engine.benchmark.workloads import Prompts
from arriero.engine.machine_peak import machine_name, matrix_product_flops, read_bandwidth
from arriero.engine.runner import TorchRunner, cache_block_size
from arriero.formats.download import resolve_model
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_attention import KernelName
from arriero.models.presets import TINY_RANDOM_LLAMA

MODEL = Path(__file__).parents[1] / "configs/models/llama-3-8b"
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
CASES = ("batch_1", "decode_128", "uneven_256")
HEADING = (
    "| machine | case | output tok/s | first token ms, p50/p99 | next token ms, p50/p99 | GB/s in decoding | of peak "
    "| prompt TFLOP/s | of peak | scheduler | memory, GiB |\n| --- | --- |" + " ---: |" * 9
)


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model of this shape, its weights drawn on the device itself."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.model.rotary.reset()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0.0, config.initializer_range, generator=generator)
    model.tie_weights()
    return model


def make_job(case: str, prompts: Prompts, tiny: bool) -> Job:
    """A case's requests; tiny: an eighth as many, of an eighth of the tokens."""
    share = 8 if tiny else 1
    if case == "batch_1":
        length, new = 128 // share, 256 // share
        return Job("decode", f"1 x ({length} in, {new} out)", [prompts.draw(length)], [new], 1)
    if case == "decode_128":
        count, length, new = 128 // share, 32 // share, 2048 // share
        drawn = [prompts.draw(length) for _ in range(count)]
        return Job("decode", f"{count} x ({length} in, {new} out)", drawn, [new] * count, count)
    count, shortest, longest = 256 // share, 100 // share, 1024 // share
    sizes = prompts.random.integers(shortest, longest + 1, (count, 2)).tolist()
    drawn = [prompts.draw(length) for length, _ in sizes]
    case = f"{count} x U({shortest},{longest})"
    return Job("mixed", case, drawn, [new for _, new in sizes], count)


def measure_case(
    case: str, model: LlamaForCausalLM, tokenizer: Tokenizer, peak: Peak, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a case."""
    config, device = model.config, model.model.embed_tokens.weight.device
    prompts = Prompts(range(config.vocab_size), model.context, np.random.default_rng(0))
    job = make_job(case, prompts, arguments.tiny)
    cost = WorkCost.of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runner = TorchRunner(
        model,
        useful_tokens=job.running_tokens(block_size=cache_block_size(model, paged_attention=arguments.attention)),
        paged_attention=arguments.attention,
        cuda_graphs=not arguments.eager,
        compile=arguments.compile,
    )
    record = measure(runner, tokenizer, job, cost, peak, repeats=arguments.repeats)
    return {
        "date": str(date.today()),
        "machine": machine_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(model.model.embed_tokens.weight.dtype),
        "parameters": config.num_parameters(),
        "attention": runner.paged_attention,
        "graphs": runner.graphs,
        "compile": arguments.compile,
        "peak": asdict(peak),
        "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        **asdict(record),
    }


def row(found: dict[str, Any]) -> str:
    first, following, prompts, answers = (found[key] for key in ("first_token", "next_token", "prompts", "answers"))
    cells = (
        found["machine"],
        found["case"],
        f"{found['output_tokens_per_second']:,.0f}",
        f"{first['p50']:,.0f}/{first['p99']:,.0f}",
        f"{following['p50']:,.1f}/{following['p99']:,.1f}",
        f"{answers['gigabytes']:,.1f}",
        f"{answers['peak_bandwidth_share']:.0%}",
        f"{prompts['gflops'] / 1e3:,.3g}",
        f"{prompts['peak_flops_share']:.0%}",
        f"{found['scheduler_share']:.1%}",
        "" if found["memory_bytes"] is None else f"{found['memory_bytes'] / 2**30:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two small layers, an eighth of requests and tokens"
    )
    parser.add_argument(
        "--attention",
        choices=get_args(KernelName),
        help="kernel of decoding (default: the fastest one; on a CPU none)",
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the layers of small steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_generate.jsonl"), help="JSON lines are added to it"
    )
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    arguments = parse(given)
    device = torch.device(device_name(arguments.device))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: --device cpu --tiny checks the program", file=sys.stderr)
        return 2
    config = LlamaConfig.from_file(arguments.model)
    if arguments.tiny:
        config = LlamaConfig.from_dict({**config.to_dict(), **TINY})
    dtype = getattr(torch, arguments.dtype)
    model = random_model(config, dtype, device)
    tokenizer = load_tokenizer(
        resolve_model(TINY_RANDOM_LLAMA)
    )  # the engine asks for one; it makes no text of these answers
    peak = Peak(matrix_product_flops(device, dtype), read_bandwidth(device))
    print(HEADING, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        found = measure_case(case, model, tokenizer, peak, arguments)
        print(row(found), flush=True)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
