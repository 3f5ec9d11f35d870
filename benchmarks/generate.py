"""Generation speed, arriero's engine beside transformers' `generate`, in the same run.

Both sides have the same model, in fp32 if `--dtype` says nothing else, the same prompts and the same lengths of answers,
greedy, each in a process of its own; they take turns, so that a drift of the machine's speed hits both. Each case is run
short once before it is measured. transformers answers in batches as they come, padded on the left, and goes on until the
longest of a batch is done; tokens beyond an answer's own length are not counted. How many answers are the same is printed:
one token that rounding decides otherwise changes the rest.

With `--compile` a third side is arriero's engine with `--torch_compile`, in the cases of few sequences; what it compiles is
there before it is measured.

    make bench BENCH=generate
    make bench BENCH=generate ARGS="--cases batch_1 uneven --rounds 5"
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import records
from records import Record
from sides import run_side

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SIDES = ("arriero", "arriero, compiled", "transformers")
DATA = Path(__file__).parents[2] / "shared" / "data" / "instruct" / "seed_tasks.jsonl"
CASES = ("batch_1", "batch_8", "uneven", "running_64", "prefill_512", "prefill", "shared_prefix")
COMPILED_CASES = ("batch_1", "batch_8", "uneven")
UNEVEN_REQUESTS, UNEVEN_RUNNING, UNEVEN_ANSWER = 64, 16, (8, 128)


def uneven(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """Real prompts, each with as many tokens to generate as its reference answer has."""
    from arriero.data.prompt_tokens import fit_prompt
    from arriero.data.sources import read_samples
    from arriero.engine.benchmark.measured import Job

    samples = read_samples(Path(arguments.dataset_path), None, "alpaca")[:UNEVEN_REQUESTS]
    prompts = [fit_prompt(sample, tokenizer, 512)[0] for sample in samples]
    shortest, longest = UNEVEN_ANSWER
    counts = [min(max(len(tokenizer.encode(sample.target)), shortest), longest) for sample in samples]
    lengths = f"{min(map(len, prompts))} to {max(map(len, prompts))} in, {min(counts)} to {max(counts)} out"
    case = f"{len(prompts)} requests ({lengths}), {UNEVEN_RUNNING} running"
    return Job("uneven", case, prompts, counts, UNEVEN_RUNNING)


def make_jobs(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The jobs of both sides, by case."""
    from arriero.config.bench import BenchOptions
    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.benchmark import workloads
    from arriero.models.config import LlamaConfig

    tokenizer, config = load_tokenizer(model), LlamaConfig.from_file(model)
    prompts = workloads.Prompts.of(tokenizer, config.vocab_size, config.max_position_embeddings, 0)

    def decode(batch: int, length: int, new: int) -> Any:
        return workloads.decode(BenchOptions(batch_sizes=[batch], src_length=length, max_new_tokens=new), prompts)[0]

    jobs = {
        "batch_1": decode(1, 128, 64),
        "batch_8": decode(8, 128, 64),
        "running_64": decode(64, 32, 32),
        "prefill_512": workloads.prefill(BenchOptions(prompt_lengths=[512]), prompts)[0],
        "prefill": workloads.prefill(BenchOptions(prompt_lengths=[2048]), prompts)[0],
        "shared_prefix": workloads.shared_prefix(BenchOptions(max_running=32), prompts)[0],
    }
    if "uneven" in arguments.cases:
        jobs["uneven"] = uneven(arguments, tokenizer)
    return {case: jobs[case] for case in arguments.cases}


def run_arriero(model: Path, jobs: dict[str, Any], threads: int, dtype: str, compiled: bool) -> dict[str, Any]:
    import torch

    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.benchmark.measured import run_job
    from arriero.engine.benchmark.record import Peak, Record, shared_work
    from arriero.engine.benchmark.rounds import warm_up
    from arriero.engine.benchmark.work_cost import WorkCost
    from arriero.engine.machine_peak import machine_name, matrix_product_flops, read_bandwidth
    from arriero.engine.runner import TorchRunner
    from arriero.formats import hf
    from arriero.models.compiled_rows import ROWS

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    kind = getattr(torch, dtype)
    network, tokenizer = hf.load_model(model, dtype=kind).eval(), load_tokenizer(model)
    cost = WorkCost.of(network)
    runner = TorchRunner(network, compile=compiled)

    def peak() -> Peak:
        return Peak(matrix_product_flops(cpu, kind), read_bandwidth(cpu))

    cases: dict[str, Any] = {}
    for case, job in jobs.items():
        if compiled and case not in COMPILED_CASES:
            continue
        for rows in ROWS if compiled else ():  # answers end one after the other, and leave any number of rows
            few = replace(job, prompts=[job.prompts[0]] * rows, new_tokens=[3] * rows, max_running=rows)
            run_job(runner, tokenizer, warm_up(few))
        run_job(runner, tokenizer, warm_up(job))
        before = peak()
        run = run_job(runner, tokenizer, job)
        after = peak()
        shared = None
        if case == "shared_prefix":
            shared = shared_work(job, run, run_job(runner, tokenizer, replace(job, prefix_cache=False)))
        best = Peak(max(before.flops, after.flops), max(before.bandwidth, after.bandwidth))
        record = asdict(Record.of(job, [run], cost, best, shared=shared))
        cases[case] = {"seconds": run.seconds, "answers": run.answers, "record": record, "peak": asdict(best)}
    return {"cases": cases, "machine": machine_name(cpu)}


def run_transformers(model: Path, jobs: dict[str, Any], threads: int, dtype: str) -> dict[str, Any]:
    from arriero.engine.benchmark.rounds import warm_up
    from arriero.engine.benchmark.transformers_side import generate, load

    network, _ = load({"folder": str(model), "dtype": dtype, "device": "cpu", "threads": threads})
    cases = {}
    for case, job in jobs.items():
        for one in (warm_up(job), job):
            wanted = {"prompts": one.prompts, "new_tokens": one.new_tokens, "batch": one.max_running}
            cases[case] = generate(network, wanted)
    return {"cases": cases}


def median(runs: list[dict[str, Any]], *keys: str) -> float:
    """Of a figure in the records of all rounds."""
    found = []
    for run in runs:
        value: Any = run["record"]
        for key in keys:
            value = value[key]
        found.append(value)
    return statistics.median(found)


def facts(case: str, runs: list[dict[str, Any]]) -> str:
    """What else is to be said of our side, for the last column."""
    told = []
    if case in ("batch_1", "batch_8"):
        told.append(
            f"{median(runs, 'answers', 'gigabytes'):.1f} GB/s read, "
            f"{median(runs, 'answers', 'peak_bandwidth_share'):.0%} of the peak"
        )
    if case in ("prefill", "prefill_512"):
        told.append(
            f"{median(runs, 'prompts', 'gflops'):.0f} GFLOP/s, {median(runs, 'prompts', 'peak_flops_share'):.0%} of the peak"
        )
    if case == "shared_prefix":
        told.append(
            f"{median(runs, 'shared', 'work_ratio'):.1f} times less prompt work and {median(runs, 'shared', 'time_ratio'):.1f} "
            "times less time than without the cache"
        )
    if case in ("uneven", "running_64"):
        told.append(f"scheduler {median(runs, 'scheduler_share'):.1%} of a step")
    return "; ".join(told)


def compared(
    case: str, job: Any, side: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], given: argparse.Namespace
) -> Record:
    """Print the line of a case, and make its record."""
    mine, other = [run["cases"][case] for run in ours], [run["cases"][case] for run in theirs]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(mine, other, strict=True)]
    equal = sum(a == b for a, b in zip(mine[-1]["answers"], other[-1]["answers"], strict=True))
    work = job.prompt_tokens if case in ("prefill_512", "prefill", "shared_prefix") else job.output_tokens
    unit = "prompt tok/s" if case in ("prefill_512", "prefill", "shared_prefix") else "tok/s"
    speeds = [work / statistics.median(run["seconds"] for run in runs) for runs in (mine, other)]
    how = side.removeprefix("arriero")
    print(
        f"| {job.case}{how} | {speeds[0]:,.1f} {unit} | {speeds[1]:,.1f} {unit} | {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {equal} of {len(job.prompts)} | {facts(case, mine)} |"
    )
    rates = ([work / run["seconds"] for run in runs] for runs in (mine, other))
    note = f"{equal} of {len(job.prompts)} answers the same; {facts(case, mine)}".removesuffix("; ")
    common = {"peer_name": "transformers generate", "threads": given.threads, "dtype": given.dtype, "note": note}
    what = f"{case}{how}: {job.case}" if given.dtype == "fp32" else f"in {given.dtype}, {case}{how}: {job.case}"
    return Record.of_rounds("generate", what, unit, *rates, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dataset_path", default=str(DATA), help="of the uneven requests")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the engine with --torch_compile too")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    records.add_json(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from arriero.formats.download import resolve_model

    model = resolve_model(arguments.model)
    if arguments.side:
        from arriero.engine.benchmark.measured import Job

        jobs = {case: Job(**values) for case, values in json.loads(Path(arguments.data).read_text()).items()}
        common = (model, jobs, arguments.threads, DTYPES[arguments.dtype])
        if arguments.side == "transformers":
            print(json.dumps(run_transformers(*common)))
        else:
            print(json.dumps(run_arriero(*common, compiled=arguments.side != "arriero")))
        return
    jobs = make_jobs(arguments, model)
    chosen = [side for side in SIDES if side != "arriero, compiled" or arguments.compile]
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "jobs.json"
        data.write_text(json.dumps({case: asdict(job) for case, job in jobs.items()}))
        for _ in range(arguments.rounds):
            for side in chosen:
                sides[side].append(run_side(__file__, sys.argv[1:], side, data, OMP_NUM_THREADS=str(arguments.threads)))
    ours, theirs = sides["arriero"], sides["transformers"]
    peaks = [case["peak"] for run in ours for case in run["cases"].values()]
    flops, bandwidth = ([peak[key] / 1e9 for peak in peaks] for key in ("flops", "bandwidth"))
    print(
        f"{date.today()}, {ours[0]['machine']}, {arguments.threads} threads, torch {version('torch')}, transformers "
        f"{version('transformers')}, {arguments.dtype}, {arguments.model}; medians of {arguments.rounds} rounds; measured "
        f"peaks: {min(flops):.0f} to {max(flops):.0f} GFLOP/s, {min(bandwidth):.0f} to {max(bandwidth):.0f} GB/s\n"
    )
    print(
        "| Case | arriero | transformers | Ratio (each round) | Same answers | |\n| --- | --- | --- | --- | --- | --- |"
    )
    told = []
    for case, job in jobs.items():
        for side in chosen[:-1]:
            if case in sides[side][0]["cases"]:
                told.append(compared(case, job, side, sides[side], theirs, arguments))
    records.write(arguments.json, told)


if __name__ == "__main__":
    main()
