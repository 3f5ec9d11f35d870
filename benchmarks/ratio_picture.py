"""The ratios of a table as a picture: a bar a figure that has a peer, and a mark where its goal is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import goals
from matplotlib.figure import Figure
from records import Record

OURS, BEHIND, GOAL = "#e8590c", "#868e96", "#212529"
TICKS = (0.5, 1, 2, 4, 8, 16, 32)


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


def _ratio(record: Record) -> float:
    assert record.ratio is not None
    return record.ratio


def _label(record: Record) -> str:
    what = record.what.removesuffix(f": {goals.MEMORY}")
    peer = record.peer_name
    return what if peer.split(" ")[0] in what else f"{what}, beside {peer}"
