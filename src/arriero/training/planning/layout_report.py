"""What a plan tells of a layout: messages, waiting, the layouts that a search found, and the programs of a dry run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from arriero.training.planning.communication import members, seconds
from arriero.training.planning.machine import Links, Machine
from arriero.training.planning.pipeline import idle_share, shares
from arriero.training.planning.search import Found
from arriero.training.planning.setup import ModelFacts, TrainingSetup
from arriero.training.planning.speed import Speed

if TYPE_CHECKING:
    from arriero.training.planning.dry_run import RankProgram

GIB = 2**30
AXIS_NAMES = {"shard": "dp_shard x cp"}
Rows = list[tuple[str, str]]


def layout_dictionary(setup: TrainingSetup, flops: float | None, speed: Speed, links: Links | None) -> dict[str, Any]:
    """JSON values of a layout's messages and waiting; empty for one device."""
    if setup.layout.size == 1:
        return {}
    messages = [
        asdict(one) | {"seconds": None if links is None else seconds(one, setup.layout, links)} for one in speed.traffic
    ]
    return {
        "communication": messages,
        "links": None if links is None else asdict(links),
        "micro_batches": setup.micro_batches,
        "bubble": idle_share(setup.layout, setup.micro_batches, recompute=setup.recompute == "full"),
        "busy_seconds": speed.busy_seconds,
        "bubble_seconds": speed.bubble_seconds,
        "waiting_seconds": speed.waiting,
        "model_utilization": None if flops is None else speed.model_utilization(flops, setup.layout.size),
    }


def layout_rows(facts: ModelFacts, setup: TrainingSetup, speed: Speed, links: Links | None, machine: Machine) -> Rows:
    """What each device sends in a step, and what of the step is waiting."""
    layout, rows = setup.layout, []
    for one in speed.traffic:
        count, _ = members(layout, one.axis)
        time = "" if links is None else f", {duration(seconds(one, layout, links))}"
        beside = "beside the arithmetic" if one.hidden else "waited for"
        label = f"{AXIS_NAMES.get(one.axis, one.axis)}, {count} devices"
        rows.append((label, f"{gib(one.size):>12}  {one.what}, {one.calls:,} calls{time}, {beside}"))
    if layout.pp > 1:
        layers = [len(share.layers) for share in shares(facts, setup)]
        rows.append(("layers of each place", _counted(layers)))
        idle = idle_share(layout, setup.micro_batches, recompute=setup.recompute == "full")
        rows.append(("bubble", f"{idle:.1%} of the pipeline's time, {setup.micro_batches} micro-batches"))
        empty = setup.micro_batches - setup.accumulation
        if empty:
            rows.append(("", f"{empty} of them empty: the order of the pipeline needs them"))
    if links is None:
        return [*rows, ("links", "not known: give --gpu or both bandwidths; messages take no time here")]
    rates = f"{links.in_node / 1e9:.0f} GB/s in a node of 8, {links.between / 1e9:.0f} GB/s between nodes"
    rows.append(("links", f"{rates} ({links.source})"))
    if speed.step_seconds is not None and speed.busy_seconds is not None and speed.bubble_seconds is not None:
        waiting = sum(speed.waiting.values())
        shares_of = (("computing", speed.busy_seconds), ("bubble", speed.bubble_seconds), ("communication", waiting))
        rows.append(("a step", ", ".join(f"{name} {part / speed.step_seconds:.1%}" for name, part in shares_of)))
    utilization = None if machine.flops is None else speed.model_utilization(machine.flops, layout.size)
    if utilization is not None:
        rows.append(("MFU", f"{utilization:.1%}, computed, not measured"))
    return rows


def _counted(layers: Sequence[int]) -> str:
    """E.g. "3 x 8, 7"."""
    words: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[start]:
            words.append(f"{end - start} x {layers[start]}" if end - start > 1 else str(layers[start]))
            start = end
    return ", ".join(words)


def search_dictionary(name: str, setup: TrainingSetup, flops: float, found: list[Found]) -> dict[str, Any]:
    """JSON values of a search."""
    return {
        "model": name,
        "devices": setup.layout.size,
        "step_tokens": setup.step_tokens,
        "layouts": [
            {
                "layout": asdict(one.setup.layout),
                "options": one.options,
                "peak": one.memory.peak,
                "bubble": (one.speed.bubble_seconds or 0.0) / (one.speed.step_seconds or 1.0),
                "communication": sum(one.speed.waiting.values()) / (one.speed.step_seconds or 1.0),
                "step_seconds": one.speed.step_seconds,
                "tokens_per_second": one.speed.tokens_per_second,
                "model_utilization": one.speed.model_utilization(flops, setup.layout.size),
            }
            for one in found
        ],
    }


def search_text(
    name: str, setup: TrainingSetup, machine: Machine, utilization: float, links: Links, found: list[Found]
) -> str:
    """The layouts as a table, the options of the fastest below."""
    device = (
        f"{gib(machine.memory)} each, {utilization:.0%} of {amount(machine.flops or 0.0, 'FLOP/s')} while computing"
    )
    lines = [
        f"{name}: the fastest layouts of {setup.layout.size:,} devices that fit, computed, not measured",
        f"  {setup.step_tokens:,} tokens a step in rows of {setup.sequence:,}; {device};",
        f"  {links.in_node / 1e9:.0f} GB/s in a node, {links.between / 1e9:.0f} GB/s between nodes ({links.source})",
        "",
    ]
    if not found:
        return "\n".join([*lines, "  none", ""])
    rows = [("tokens/s", "MFU", "memory", "bubble", "waits", "rows", "micro-batches", "recompute", "layout")]
    for one in found:
        speed, step = one.speed, one.speed.step_seconds or 1.0
        rows.append(
            (
                f"{speed.tokens_per_second or 0.0:,.0f}",
                f"{speed.model_utilization(machine.flops or 1.0, setup.layout.size) or 0.0:.1%}",
                gib(one.memory.peak),
                f"{(speed.bubble_seconds or 0.0) / step:.1%}",
                f"{sum(speed.waiting.values()) / step:.1%}",
                str(one.setup.batch),
                str(one.setup.accumulation),
                one.setup.recompute,
                str(one.setup.layout),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-2], widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[-2].ljust(widths[-2]), row[-1]]))
    return "\n".join([*lines, "", "The first one:", f"  {found[0].options}", ""])


def program_dictionary(program: RankProgram) -> dict[str, Any]:
    """JSON values of one rank of a dry run."""
    return {
        "rank": program.rank,
        "coordinates": asdict(program.at),
        "weights": program.nbytes,
        "parameters": [asdict(tensor) for tensor in program.tensors],
    }


def program_text(programs: list[RankProgram]) -> str:
    """What each rank of a dry run holds, layers alike on one line."""
    lines = []
    for program in programs:
        at = ", ".join(f"{axis} {place}" for axis, place in asdict(program.at).items())
        lines.append(f"Rank {program.rank:,} as built ({at}): {gib(program.nbytes)} of weights")
        alike: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
        for tensor in program.tensors:
            key = (re.sub(r"\.layers\.\d+\.", ".layers.*.", tensor.name), tensor.size, tensor.shape)
            alike[key] = alike.get(key, 0) + 1
        width = max(len(name) for name, _, _ in alike)
        for (name, size, shape), count in alike.items():
            times = f"  x {count}" if count > 1 else ""
            lines.append(f"  {name:<{width}}  {_shape(size)} of {_shape(shape)}{times}")
        lines.append("")
    return "\n".join(lines)


def _shape(size: tuple[int, ...]) -> str:
    return " x ".join(f"{length:,}" for length in size)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"


def amount(value: float, unit: str) -> str:
    """A number with the prefix of its unit."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.3g} P{unit}"


def duration(time: float) -> str:
    """Seconds for people."""
    if time < 120:
        return f"{time:.3g} s"
    if time < 2 * 3600:
        return f"{time / 60:.1f} min"
    return f"{time / 3600:.1f} h" if time < 2 * 86400 else f"{time / 86400:,.1f} days"
