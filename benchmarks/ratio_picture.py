"""The ratios of a table as pictures: a bar a figure that has a peer, and a mark where its goal is; and a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import goals
from matplotlib.figure import Figure
from records import Record

OURS, BEHIND, GOAL = "#e8590c", "#868e96", "#212529"
TICKS = (0.5, 1, 2, 4, 8, 16, 32)
# What the README shows: how a figure and its peer begin, and the label.
FEW = (
    ("served, 16 clients, int4: all tokens", "llama-cpp", "serving 16 clients, int4 (llama-cpp-python's server)"),
    ("LoRA, torchtune's recipe", "torchtune", "LoRA, packed rows of uneven length (torchtune)"),
    ("LoRA on uneven rows", "transformers", "LoRA, packed rows of uneven length (transformers + PEFT)"),
    ("uneven:", "transformers", "generation, 64 uneven requests (transformers)"),
    ("full fine-tune of 135M, real rows", "transformers", "full fine-tuning (transformers)"),
    ("lora fine-tune of 135M, real rows", "transformers", "LoRA (transformers + PEFT)"),
    ("batch_8:", "transformers", "generation, 8 requests (transformers)"),
    ("prefill:", "transformers", "a prompt of 2,048 tokens (transformers)"),
    ("LoRA, litgpt's own task", "litgpt", "LoRA, its own task (litgpt)"),
    ("int4 bundle, decode 1,", "llama.cpp", "generation, one request, int4, ONNX (llama.cpp)"),
    ("preprocess of 32 MB, 1 worker", "datasets", "preparing a corpus, one process (datasets.map)"),
    (
        "aoti int4 bundle, decode 1,",
        "onnxruntime-genai",
        "generation, one request, int4, native code (onnxruntime-genai)",
    ),
    ("int4 bundle, decode 1,", "onnxruntime-genai", "generation, one request, int4, ONNX (onnxruntime-genai)"),
)


def draw(path: Path, found: Sequence[Record]) -> None:
    """Speed above, memory below, each from the greatest ratio to the least; 1 is the peer."""
    shown = [record for record in found if record.ratio is not None and record.program not in ("growth", "roofline")]
    parts = [
        sorted((record for record in shown if memory == record.what.endswith(goals.MEMORY)), key=_ratio, reverse=True)
        for memory in (False, True)
    ]
    heights = [max(1, len(part)) for part in parts]
    figure = Figure(figsize=(11, 1.2 + 0.25 * sum(heights)), layout="constrained")
    both = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    for axes, part, title in zip(both, parts, ("times as fast", "times less memory"), strict=True):
        ratios = [_ratio(record) for record in part]
        places = range(len(part))
        colours = [OURS if ratio >= 1 else BEHIND for ratio in ratios]
        axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.7)
        for place, record in zip(places, part, strict=True):
            ratio, goal = _ratio(record), goals.goal_of(record)
            axes.text(max(ratio, 1) * 1.03, place, f"{ratio:.2f}", va="center", fontsize=7)
            if goal is not None and goal.ratio is not None and goal.ratio != 1:
                axes.plot([goal.ratio] * 2, [place - 0.4, place + 0.4], color=GOAL, linewidth=1)
        axes.set_yticks(places, [_label(record) for record in part], fontsize=7)
        axes.set(xscale="log", title=title)
        axes.invert_yaxis()
        axes.axvline(1, color=GOAL, linewidth=1)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    both[-1].set_xlabel("arriero beside the peer, in the same run; the short line is the goal")
    figure.savefig(path, dpi=110)


def draw_few(path: Path, found: Sequence[Record]) -> None:
    """Speed alone, of what `FEW` names."""
    shown = []
    for what, peer, label in FEW:
        fits = (one for one in found if one.what.startswith(what) and not one.what.endswith(goals.MEMORY))
        record = next((one for one in fits if one.peer_name.startswith(peer) and one.ratio is not None), None)
        if record is not None:
            shown.append((_ratio(record), label))
    shown.sort(reverse=True)
    figure = Figure(figsize=(9, 0.7 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = [OURS if ratio >= 1 else BEHIND for ratio, _ in shown]
    axes.barh(range(len(shown)), [ratio for ratio, _ in shown], color=colours, height=0.7)
    for place, (ratio, _) in enumerate(shown):
        axes.text(ratio + 0.06, place, f"{ratio:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [label for _, label in shown], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color=GOAL, linewidth=1)
    axes.set_xlabel("times as fast as the tool in brackets, in the same run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _ratio(record: Record) -> float:
    assert record.ratio is not None
    return record.ratio


def _label(record: Record) -> str:
    what = record.what.removesuffix(f": {goals.MEMORY}")
    peer = record.peer_name
    return what if peer.split(" ")[0] in what else f"{what}, beside {peer}"
