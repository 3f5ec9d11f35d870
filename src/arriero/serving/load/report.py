"""The figures of a load for people and programs: lines of a table, JSON, a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from arriero import __version__
from arriero.engine.benchmark import figures
from arriero.serving.load.record import RateRecord, Times

COLUMNS = (
    ("sent/s", 7),
    ("done/failed", 12),
    ("done/s", 7),
    ("good/s", 7),
    ("at once", 7),
    ("output tok/s", 12),
    ("TTFT ms", 14),
    ("TPOT ms", 12),
    ("ITL ms", 12),
    ("E2EL ms", 15),
)
EXPLANATION = (
    "times: p50/p99 of what was answered whole; TTFT: to the first text; TPOT: mean of an answer's further tokens;\n"
    "ITL: between neighbouring parts of an answer; E2EL: to its end; good: kept to --goodput; tokens are what the server counts"
)
LATE = 20.0  # milliseconds of lag from which it is told


@dataclass(frozen=True)
class Setting:
    """What was asked, and of whom."""

    base_url: str
    model: str
    api: str
    prompts: str
    different_prompts: int
    num_requests: int
    max_tokens: int
    temperature: float
    ignore_eos: bool
    seed: int

    def text(self) -> str:
        """Two lines."""
        return (
            f"{self.model} at {self.base_url} ({self.api}); {date.today()}, arriero {__version__}, {os.cpu_count()} processors "
            f"here\n{self.num_requests} requests at each rate, {self.different_prompts} different prompts ({self.prompts}); "
            f"answers of {'' if self.ignore_eos else 'at most '}{self.max_tokens} tokens, temperature {self.temperature:g}"
        )


def heading() -> str:
    """The line above the table."""
    return figures.heading(COLUMNS)


def lines(record: RateRecord) -> str:
    """A rate's line of the table, and what must be known with it."""
    cells = (
        f"{record.request_rate:g}" if record.request_rate else "at once",
        f"{record.completed}/{record.failed}",
        f"{record.request_throughput:,.2f}",
        "" if record.request_goodput is None else f"{record.request_goodput:,.2f}",
        f"{record.max_concurrent_requests}",
        "" if record.output_throughput is None else f"{record.output_throughput:,.1f}",
        *(figures.p50_p99(times) for times in (record.ttft, record.tpot, record.itl, record.e2el)),
    )
    found = [figures.table_line(cells, COLUMNS)]
    found += [f"  {count} failed: {reason}" for reason, count in record.errors.items()]
    if record.completed and record.output_throughput is None:
        found.append("  the server does not say how many tokens there were (stream_options.include_usage)")
    if record.send_lag is not None and record.send_lag.p99 > LATE:
        found.append(
            f"  requests were sent up to {record.send_lag.max:,.0f} ms late: this machine is too busy to ask at such a rate"
        )
    return "\n".join(found)


def as_dictionary(setting: Setting, records: Sequence[RateRecord]) -> dict[str, Any]:
    """Everything, for JSON; times end in `_ms`."""
    rates = []
    for record in records:
        values = asdict(record)
        rates.append({f"{key}_ms" if isinstance(getattr(record, key), Times) else key: values[key] for key in values})
    return {
        "arriero": __version__,
        "date": str(date.today()),
        "platform": platform.platform(),
        **asdict(setting),
        "rates": rates,
    }


def draw(path: Path, setting: Setting, records: Sequence[RateRecord]) -> None:
    """A PNG picture: times, tokens and requests by rate; all at once stands at the right.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    figure = figures.new_picture(12, 4)
    ordered = sorted(records, key=lambda record: record.request_rate or float("inf"))
    names = [f"{record.request_rate:g}" if record.request_rate else "at once" for record in ordered]
    first, between, rates = figure.subplots(1, 3)
    for axes, name, label in ((first, "ttft", "time to first token, ms"), (between, "itl", "between parts, ms")):
        for share, style in (("p50", "o-"), ("p90", "^--"), ("p99", "s:")):
            found = [(at, getattr(record, name)) for at, record in enumerate(ordered)]
            kept = [(at, getattr(times, share)) for at, times in found if times is not None]
            axes.plot([at for at, _ in kept], [value for _, value in kept], style, label=share)
        axes.set(ylabel=label, ylim=(0, None))
    done = [record.request_throughput for record in ordered]
    rates.plot(range(len(ordered)), done, "o-", label="requests answered a second")
    good = [record.request_goodput for record in ordered]
    if None not in good:
        rates.plot(range(len(ordered)), good, "^--", label="of them good")
    rates.set(ylabel="requests/s", ylim=(0, None))
    tokens = rates.twinx()
    counted = [record.output_throughput for record in ordered]
    if None not in counted:
        tokens.plot(range(len(ordered)), counted, "s:", color="tab:green", label="tokens of answers a second")
        tokens.set(ylabel="tokens/s", ylim=(0, None))
    for axes in (first, between, rates):
        axes.set(xlabel="requests sent a second")
        axes.set_xticks(range(len(ordered)), names)
        axes.grid(alpha=0.3)
    for axes in (first, between):
        axes.legend(fontsize=7)
    handles = [*rates.get_legend_handles_labels()[0], *tokens.get_legend_handles_labels()[0]]
    rates.legend(handles=handles, fontsize=7, loc="upper left")
    figures.save_picture(figure, path, setting.text())
