"""Every recipe of configs/finetune on the same rows: score before and after, trained parameters, memory, time.

    make bench BENCH=methods ARGS="--dataset_path ../shared/data/squad"
    make bench BENCH=methods ARGS="--only lora,prefix --max_train_samples 160"
    make bench BENCH=methods ARGS=--speed    # a few steps of each, on a machine that does nothing else

Each training and each scoring is a process of its own, by the commands a user gives. Results are added to
RUNS/methods.jsonl and RUNS/speed.jsonl as they come; what is there already is not run again. Afterwards the table of
configs/README.md is rewritten.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from records import processor

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs/finetune"
DOCUMENT = ROOT / "configs/README.md"
BEGIN, END = "<!-- made by make bench BENCH=methods: begin -->", "<!-- made by make bench BENCH=methods: end -->"
BASE = "none (the model as it comes)"
PREFERENCES = "full + dpo"
SPEED_STEPS = 5
AFTERWARDS = {  # what is made of a finished run, and scored in its place
    "full + int4": ("full", ["quantize", "--quant_type", "weight_only_int4", "--group_size", "32"]),
    "full + int8": ("full", ["quantize", "--quant_type", "weight_only_int8"]),
}


def arriero(*arguments: str, log: Path) -> tuple[float, float]:
    """Run a command; gives its seconds and its peak memory in GiB.

    Raises:
        SystemExit: with the end of what it printed, if it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", "arriero", *arguments], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{log.read_text(encoding='utf-8')[-3000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def score(model: Path | str, adapter: list[str], given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Exact match and F1 on the held-out questions."""
    arguments = ["evaluate", "--model_name_or_path", str(model), "--task_name", "squad_qa"]
    arguments += ["--dataset_path", given.dataset_path, "--src_length", "448", "--tgt_length", "24"]
    arguments += ["--max_new_tokens", "24", "--max_eval_samples", str(given.max_eval_samples)]
    arriero(*arguments, *adapter, "--output_dir", str(folder / "score"), log=folder / "score.log")
    result: dict[str, float] = json.loads((folder / "score/eval_results.json").read_text(encoding="utf-8"))
    return result


def size_of(folder: Path) -> float:
    """MiB of what has to be kept: the weights or the adapter."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20


def train(recipe: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train by a recipe and score what came out; a run with rounded weights is converted first."""
    arguments = ["finetune", "--config", str(RECIPES / f"{recipe}.yaml"), "--dataset_path", given.dataset_path]
    arguments += ["--max_train_samples", str(given.max_train_samples), "--output_dir", str(folder)]
    arguments += ["--overwrite_output_dir", "--disable_tqdm", "--report_to", "none"]
    _, memory = arriero(*arguments, log=folder.with_suffix(".train.log"))
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    model, adapter, kept = str(folder), [], folder
    if recipe.startswith("prefix"):
        model, adapter = given.model, ["--prefix_path", str(folder)]
    elif (folder / "adapter_config.json").is_file():
        model, adapter = given.model, ["--lora_path", str(folder)]
    if "qat" in recipe:
        kept = folder / "quantized"
        arriero(
            *["convert", "--model_name_or_path", str(folder), "--output_path", str(kept), "--to", "quantized"],
            log=folder / "convert.log",
        )
        model, adapter = str(kept), []
    return {
        "memory": memory,
        "seconds": results["train_seconds"],
        "trained": results["trained_parameters"],
        "megabytes": size_of(kept),
        **score(model, adapter, given, folder),
    }


def speed(recipe: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second: the median of a few steps, the first left out. Every recipe has the same rows in each of them."""
    arguments = ["finetune", "--config", str(RECIPES / f"{recipe}.yaml"), "--dataset_path", given.dataset_path]
    arguments += ["--max_train_samples", "80", "--max_steps", str(SPEED_STEPS), "--output_dir", str(folder)]
    arguments += ["--overwrite_output_dir", "--disable_tqdm", "--report_to", "none", "--logging_steps", "1"]
    arriero(*arguments, log=folder.with_suffix(".train.log"))
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [step["tokens_per_second"] for step in map(json.loads, lines) if "tokens_per_second" in step]
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "machine": processor(),
        "date": str(datetime.date.today()),
    }


def afterwards(name: str, given: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """Quantize a finished run and score it."""
    source, (verb, *options) = AFTERWARDS[name]
    folder = runs / name.replace(" + ", "-")
    arguments = [verb, "--model_name_or_path", str(runs / source), "--output_path", str(folder / "model"), *options]
    seconds, memory = arriero(*arguments, log=folder / "quantize.log")
    kept = folder / "model"
    return {"memory": memory, "seconds": seconds, "megabytes": size_of(kept), **score(kept, [], given, folder)}


def preferences(given: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """DPO after the full fine-tune, on its own mistakes: an answer that it draws and that is wrong, beside the right one."""
    from arriero.data.sources import read_samples
    from arriero.data.squad import f1_score

    folder, model = runs / PREFERENCES.replace(" + ", "-"), str(runs / "full")
    folder.mkdir(parents=True, exist_ok=True)
    samples = read_samples(Path(given.dataset_path) / "train.json", "squad_qa")[: given.max_train_samples]
    questions = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    asked, drawn, pairs = folder / "questions.jsonl", folder / "drawn.jsonl", folder / "pairs.jsonl"
    asked.write_text("".join(json.dumps({"messages": question}) + "\n" for question in questions), encoding="utf-8")
    arriero(
        *["predict", "--model_name_or_path", model, "--data_file", str(asked), "--predict_file", str(drawn)],
        *["--src_length", "448", "--max_new_tokens", "24", "--do_sample", "--temperature", "1.0", "--seed", "0"],
        log=folder / "predict.log",
    )
    answers = [json.loads(line)["output"] for line in drawn.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": question, "chosen": _said(sample.references[0]), "rejected": _said(answer)}
        for sample, question, answer in zip(samples, questions, answers, strict=True)
        if answer and f1_score(answer, sample.references) < 0.5
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["finetune", "--config", str(RECIPES / "dpo.yaml"), "--model_name_or_path", model]
    arguments += ["--dataset_path", str(pairs), "--output_dir", str(folder / "adapter"), "--overwrite_output_dir"]
    _, memory = arriero(*arguments, "--disable_tqdm", "--report_to", "none", log=folder / "train.log")
    results = json.loads((folder / "adapter/all_results.json").read_text(encoding="utf-8"))
    return {
        "memory": memory,
        "seconds": results["train_seconds"],
        "trained": results["trained_parameters"],
        "megabytes": size_of(folder / "adapter"),
        "pairs": len(rows),
        **score(model, ["--lora_path", str(folder / "adapter")], given, folder),
    }


def _said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def table(results: dict[str, dict[str, Any]], speeds: dict[str, dict[str, Any]], given: argparse.Namespace) -> str:
    rows = [
        "| Recipe | exact match | F1 | trained parameters | kept | peak memory | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results.items():
        first, _, recipe = name.rpartition(" + ")
        label = f"[{recipe}.yaml](finetune/{recipe}.yaml)" if (RECIPES / f"{recipe}.yaml").is_file() else recipe
        label = f"{first} + {label}" if first else label
        if not found:
            rows.append(f"| {label} | not measured yet | | | | | |")
            continue
        trained = f"{found['trained']:,}" if "trained" in found else ""
        kept = f"{found['megabytes']:.1f} MiB" if "megabytes" in found else ""
        memory = f"{found['memory']:.1f} GiB" if "memory" in found else ""
        rate = f"{speeds[name]['tokens_per_second']:.0f}" if name in speeds else ""
        rows.append(
            f"| {label} | {found['exact_match']:.1f} | {found['f1']:.1f} | {trained} | {kept} | {memory} | {rate} |"
        )
    made = (
        f"{datetime.date.today()}, {processor()}, Python {platform.python_version()}, torch {version('torch')}, fp32, "
        f"2 threads; {given.max_train_samples} training questions, {given.max_eval_samples} held-out ones"
    )
    alone = sorted({f"{found['date']}, {found['machine']}" for found in speeds.values()})
    measured = (
        f" Tokens/s: the median of steps 2 to {SPEED_STEPS}, measured with priority ({'; '.join(alone)})."
        if alone
        else ""
    )
    return "\n".join([*rows, "", f"{made}.{measured}"])


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured before, by recipe."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", default=str(ROOT / "../shared/data/squad"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods")
    parser.add_argument("--max_train_samples", type=int, default=480)
    parser.add_argument("--max_eval_samples", type=int, default=400)
    parser.add_argument("--only", help="names, by commas; default all")
    parser.add_argument("--speed", action="store_true", help="measure tokens a second instead of scores")
    parser.add_argument("--print", action="store_true", help="measure nothing, and only print the table")
    given = parser.parse_args()
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("dpo"))
    measured = recipes if given.speed else [BASE, *recipes, PREFERENCES, *AFTERWARDS]
    names = [] if given.print else given.only.split(",") if given.only else measured
    record = given.runs / ("speed.jsonl" if given.speed else "methods.jsonl")
    record.parent.mkdir(parents=True, exist_ok=True)
    results = recorded(record)
    found: dict[str, Any]
    for name in names:
        if name in results:
            continue
        if given.speed:
            found = speed(name, given, given.runs / "speed" / name)
        elif name == BASE:
            found = dict(score(given.model, [], given, given.runs / "base"))
        elif name == PREFERENCES:
            found = preferences(given, given.runs)
        elif name in AFTERWARDS:
            found = afterwards(name, given, given.runs)
        else:
            found = train(name, given, given.runs / name)
        results[name] = {"name": name, **found}
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[name]) + "\n")
        print(name, *(f"{key} {value:.1f}" for key, value in found.items() if isinstance(value, float)), flush=True)
    scores, speeds = recorded(given.runs / "methods.jsonl"), recorded(given.runs / "speed.jsonl")
    made = table({name: scores.get(name, {}) for name in [BASE, *recipes, PREFERENCES, *AFTERWARDS]}, speeds, given)
    print(made)
    if not given.print:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
