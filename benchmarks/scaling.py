"""Weak and strong scaling of Llama models on H100s as `arriero plan --search` computes it: the tables of docs/scaling.md.

    python benchmarks/scaling.py > tables.md

Nothing is measured. Each row is the fastest layout that the search finds for that many GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from arriero.config.layout import Layout
from arriero.models.config import LlamaConfig
from arriero.models.presets import find_preset
from arriero.training.planning.machine import COMPUTING_UTILIZATION, DEVICE_MEMORY, find_links
from arriero.training.planning.memory import training_memory
from arriero.training.planning.search import search
from arriero.training.planning.setup import ModelFacts, TrainingSetup, model_facts
from arriero.training.planning.speed import training_speed

MODELS = Path(__file__).parents[1] / "configs/models"
GPUS = (8, 64, 512, 2048, 8192, 16384)
PEAK = 989e12
HALF = TrainingSetup(compute_dtype="bfloat16", weight_dtype="bfloat16", device="cuda")
# name, tokens of a row, rows a step: for each 8 GPUs (weak), and in all (strong)
CASES = (("7B", 4096, 8, 1024), ("70B", 8192, 2, 2048), ("405B", 8192, 1, 2048))
# GPUs, cp, dp, tokens of a row, micro-batches, TFLOP/s of a GPU, MFU: table 4 of arXiv:2407.21783
LLAMA_3 = (
    (8192, 1, 64, 8192, 32, 430, 0.43),
    (16384, 1, 128, 8192, 16, 400, 0.41),
    (16384, 16, 8, 131072, 16, 380, 0.38),
)


def config(name: str) -> LlamaConfig:
    """The shapes of Llama 2 7B and of Llama 3.1."""
    if name == "405B":
        return LlamaConfig.from_file(MODELS / "llama-3.1-405b")
    return find_preset({"7B": "llama-2-7b", "70B": "llama-3.1-70b"}[name]).config


def row(facts: ModelFacts, devices: int, sequence: int, rows: int) -> str:
    links = find_links("H100", None, None)
    assert links is not None
    setup = replace(HALF, sequence=sequence, batch=1, accumulation=1, layout=Layout(dp_replicate=devices))
    found = search(
        facts,
        setup,
        rows=rows,
        memory=int(DEVICE_MEMORY["H100"]),
        flops=PEAK,
        utilization=COMPUTING_UTILIZATION,
        links=links,
        most=1,
    )
    start = f"| {devices:,} | {rows * sequence / 1e6:,.2f} M |"
    if not found:
        return f"{start} none fits | | | | | | |"
    best = found[0]
    speed, step = best.speed, best.speed.step_seconds or 1.0
    waits = sum(speed.waiting.values()) / step
    return (
        f"{start} {best.setup.layout}; {best.setup.accumulation} x {best.setup.batch}, recompute {best.setup.recompute} "
        f"| {best.memory.peak / 2**30:.0f} | {(speed.bubble_seconds or 0.0) / step:.1%} | {waits:.1%} "
        f"| {(speed.tokens_per_second or 0.0) / devices:,.0f} | {speed.model_utilization(PEAK, devices):.1%} | {step:.2f} |"
    )


def main() -> None:
    heading = (
        "| GPUs | tokens a step | layout; micro-batches | GiB | bubble | waits | tokens/s a GPU | MFU | s a step |"
    )
    rule = "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, sequence, weak, strong in CASES:
        facts = model_facts(config(name))
        print(f"### {name}: {facts.total:,} parameters, rows of {sequence:,} tokens\n")
        for kind, rows in (("Weak", None), ("Strong", strong)):
            print(f"{kind} scaling:\n\n{heading}\n{rule}")
            for devices in GPUS:
                print(row(facts, devices, sequence, rows or devices // 8 * weak), flush=True)
            print()
    facts, links = model_facts(config("405B")), find_links("H100", None, None)
    print("### Llama 3 405B as it was trained\n")
    print(
        "| GPUs | tp x cp x pp x dp | tokens of a row | MFU published | MFU computed | off by | GiB, recompute full |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for devices, cp, dp, sequence, micro_batches, _, published in LLAMA_3:
        layout = Layout(tp=8, cp=cp, pp=16, dp_shard=dp, stage=1, schedule="interleaved", virtual=7)
        setup = replace(HALF, sequence=sequence, accumulation=micro_batches, layout=layout)
        speed = training_speed(facts, setup, PEAK, COMPUTING_UTILIZATION, links)
        computed = speed.model_utilization(PEAK, devices) or 0.0
        peak = training_memory(facts, replace(setup, recompute="full")).peak / 2**30
        print(
            f"| {devices:,} | 8 x {cp} x 16 x {dp} | {sequence:,} | {published:.0%} | {computed:.1%} "
            f"| {computed / published - 1:+.1%} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
