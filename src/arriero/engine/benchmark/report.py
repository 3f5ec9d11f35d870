"""A benchmark's figures for people and programs: lines of a table, JSON, a picture."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from arriero import __version__
from arriero.engine.benchmark import figures
from arriero.engine.benchmark.record import Peak, Record
from arriero.engine.kv_memory import KVMemory

COLUMNS = (
    ("output tok/s", 20),
    ("prompt tok/s", 12),
    ("first token ms", 15),
    ("next token ms", 13),
    ("GFLOP/s", 13),
    ("GB/s", 11),
    ("scheduler", 9),
)
EXPLANATION = (
    "prompt tok/s and GFLOP/s: of the steps that compute prompts; GB/s: weights, keys and values read by the steps that only\n"
    "go on with answers; (%): of the measured peak; first and next token: p50/p99, waiting for a turn counted; scheduler: the\n"
    "share of a step that is neither the model's nor the sampler's"
)


@dataclass(frozen=True)
class Setting:
    """Where and with what it was measured.

    Attributes:
        model: its name, as given.
        parameters: how many.
        kv_memory: for keys and values.
        context: tokens that a request can have.
        peers: versions of other programs, by name.
    """

    model: str
    parameters: int
    dtype: str
    device: str
    machine: str
    threads: int
    peak: Peak
    kv_memory: KVMemory
    context: int
    peers: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Three lines."""
        others = "".join(f", {name} {number}" for name, number in self.peers.items())
        return (
            f"{self.model}, {self.parameters / 1e6:,.1f} million parameters, {self.dtype}; {date.today()}, {self.machine}, "
            f"{self.device}, {self.threads} threads; arriero {__version__}, torch {version('torch')}{others}\n"
            f"measured peaks: {self.peak.flops / 1e9:,.0f} GFLOP/s (matrix product), "
            f"{self.peak.bandwidth / 1e9:,.1f} GB/s (reading)\n{self.kv_memory.text(self.context)}"
        )


def heading() -> str:
    """The line above the table."""
    return figures.heading(COLUMNS)


def lines(record: Record) -> str:
    """What a record is of, its line of the table, and what follows it."""
    prompts, answers = record.prompts, record.answers
    cells = (
        f"{record.output_tokens_per_second:,.1f}" if answers else "",
        f"{prompts.tokens_per_second:,.1f}" if prompts else "",
        figures.p50_p99(record.first_token),
        figures.p50_p99(record.next_token),
        f"{prompts.gflops:,.0f} ({prompts.peak_flops_share:.0%})" if prompts else "",
        f"{answers.gigabytes:,.1f} ({answers.peak_bandwidth_share:.0%})" if answers else "",
        f"{record.scheduler_share:.1%}",
    )
    found = [
        f"{record.workload}: {record.case}",
        figures.table_line(cells, COLUMNS),
    ]
    if record.shared is not None:
        shared = record.shared
        found.append(
            f"  with the prefix cache {shared.computed_with:,} tokens of prompts are computed, without it "
            f"{shared.computed_without:,}: {shared.work_ratio:.1f} times as many, {shared.time_ratio:.1f} times the time"
        )
    if record.preemptions:
        found.append(f"  {record.preemptions} times a request lost its blocks: the key-value cache is small for this")
    for name, other in record.against.items():
        rounds = ", ".join(f"{ratio:.2f}" for ratio in other.ratios)
        found.append(
            f"  {other.ratio:.2f} times as fast as {name} ({record.output_tokens / other.seconds:,.1f} output tok/s; each "
            f"round: {rounds}); {other.equal_answers:.0%} of the answers are the same"
        )
    return "\n".join(found)


def as_dictionary(setting: Setting, records: Sequence[Record]) -> dict[str, Any]:
    """Everything, for JSON. Latencies are in milliseconds, `gflops` and `gigabytes` in billions a second, shares in 0 to 1."""
    return {
        "arriero": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": str(date.today()),
        **asdict(setting),
        "workloads": [asdict(record) for record in records],
    }


def draw(path: Path, setting: Setting, records: Sequence[Record]) -> None:
    """A PNG picture: speed (beside other programs), latencies, and shares of the machine's peaks.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    figure = figures.new_picture(12, 1.6 + 0.6 * len(records))
    speed, shares, latency = figure.subplots(1, 3, sharey=True)
    places = np.arange(len(records))
    tokens = [record.prompt_tokens + record.output_tokens for record in records]
    sides = {"arriero": [record.total_tokens_per_second for record in records]}
    for name in setting.peers:
        sides[name] = [n / r.against[name].seconds for n, r in zip(tokens, records, strict=True)]
    for marker, (name, rates) in zip("osD^v", sides.items(), strict=False):
        speed.plot(rates, places, marker, label=name)
    _decades(speed, [rate for rates in sides.values() for rate in rates])
    speed.set(xlabel="tokens/s, prompts and answers")
    for offset, name, values in (
        (-0.2, "arithmetic, prompts", [r.prompts.peak_flops_share if r.prompts else 0.0 for r in records]),
        (0.2, "memory, answers", [r.answers.peak_bandwidth_share if r.answers else 0.0 for r in records]),
    ):
        shares.barh(places + offset, [100 * value for value in values], 0.4, label=name)
    shares.set(xlabel="% of the measured peak")
    seen = []
    for name, found in (
        ("first token", [r.first_token for r in records]),
        ("next token", [r.next_token for r in records]),
    ):
        kept = [(place, value) for place, value in zip(places, found, strict=True) if value is not None]
        above = [[0.0] * len(kept), [value.p99 - value.p50 for _, value in kept]]
        if kept:
            latency.errorbar([v.p50 for _, v in kept], [p for p, _ in kept], xerr=above, fmt="o", capsize=3, label=name)
        seen += [number for _, value in kept for number in (value.p50, value.p99)]
    _decades(latency, seen)
    latency.set(xlabel="ms, p50 to p99")
    speed.set_yticks(places, [f"{record.workload}\n{record.case}" for record in records], fontsize=7)
    speed.invert_yaxis()
    for axes in (speed, shares, latency):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figures.save_picture(figure, path, setting.text())


def _decades(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis from one power of ten to another, with nothing written between them."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    axes.set(xscale="log", xlim=(10.0**low, 10.0 ** max(high, low + 1)))
    axes.tick_params(axis="x", which="minor", labelbottom=False)
