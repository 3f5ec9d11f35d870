"""Growth curves: time and memory against sequence, batch, layers, corpus, clients, running requests and processes.

Each point is a process of its own and has the law beside it that it should follow, computed from the model and this machine's
measured peaks (growth_laws.py): seconds are compared in their growth alone, so the law is drawn through the last point but one;
bytes are compared as they are. An exponent is log(y2 / y1) / log(x2 / x1) between the last two points: 1 is linear. What grows
faster than its law by more than 0.15 is marked.

    make bench BENCH=growth                                  all, about 6 minutes on 2 quiet cores; rewrites docs/growth.png
    make bench BENCH=growth ARGS="--only decode prefill"     some of them
    make bench BENCH=growth ARGS="--quick --picture /tmp/growth.png"     two small points of each, for a check
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
from growth_cases import CURVES
from growth_laws import Law, law
from peaks import Peaks
from peaks import measure as measure_peaks
from records import Record

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/growth.png"
DOCUMENT = ROOT / "docs/performance.md"
POINTS = Path(__file__).parent / "results/growth.jsonl"
TOLERANCE = 0.15  # of an exponent
SMALL = 16 * 2**20  # bytes of difference that are the allocator's, not a law's
COUNTED = ("train-sequence", "train-batch", "train-layers", "ranks", "prefill", "decode")  # whose bytes are the point's


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        seconds, bytes: measured; None where it is only computed.
        law: what it should take.
    """

    x: int
    seconds: float | None
    bytes: float | None
    law: Law


def run_point(curve: str, x: int, threads: int, steps: int) -> dict[str, Any]:
    """Measure a point in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if curve in COUNTED:
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    command = [sys.executable, str(Path(__file__).with_name("growth_points.py")), curve, str(x), "--steps", str(steps)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def exponent(points: list[tuple[int, float]]) -> float:
    """Between the last two."""
    (x1, y1), (x2, y2) = points[-2:]
    return math.log(y2 / y1) / math.log(x2 / x1)


@dataclass(frozen=True)
class Found:
    """A curve with its points, all measured ones first."""

    name: str
    points: list[Point]

    @property
    def measured(self) -> list[Point]:
        return [point for point in self.points if point.seconds is not None]

    @property
    def share(self) -> float:
        """Of the peaks, at the last point but one: through it the law of seconds is drawn."""
        point = self.measured[-2]
        assert point.seconds is not None
        return point.law.seconds / point.seconds

    def _reached(self) -> str:
        return "" if self.name == "corpus" else f"{self.share:.0%} of the peak"

    def seconds(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Measured, and by the law."""
        own = [(point.x, point.seconds) for point in self.measured if point.seconds is not None]
        return own, [(point.x, point.law.seconds / self.share) for point in self.points]

    def bytes(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Measured, and by the law; one without bytes says that they stay what they are at the first point."""
        own = [(point.x, max(point.bytes, 1.0)) for point in self.measured if point.bytes is not None]
        flat = own[0][1]
        return own, [(point.x, flat if point.law.bytes is None else point.law.bytes) for point in self.points]

    def exponents(self, kind: str) -> tuple[float, float]:
        """Measured and expected, of "seconds" or "bytes"."""
        own, expected = getattr(self, kind)()
        return exponent(own), exponent(expected[: len(own)])

    def too_fast(self, kind: str) -> bool:
        """Whether it grows faster than it should."""
        measured, expected = self.exponents(kind)
        own, _ = getattr(self, kind)()
        if kind == "bytes" and own[-1][1] - own[-2][1] < SMALL:
            return False
        return measured > expected + TOLERANCE

    def records(self, threads: int) -> list[Record]:
        """As the runner of all programs takes them: ours is the measured exponent, the peer's the law's."""
        found = []
        for kind in ("seconds", "bytes"):
            measured, expected = self.exponents(kind)
            what = f"{CURVES[self.name].title}: {kind} against {CURVES[self.name].x}"
            note = "grows faster than it should" if self.too_fast(kind) else ""
            found.append(
                Record(
                    "growth",
                    what,
                    measured,
                    "exponent",
                    "law",
                    expected,
                    (1.0 + expected - measured,),
                    threads,
                    note=note,
                )
            )
        return found

    def rows(self) -> list[str]:
        """Of the table: one for seconds, one for bytes."""
        curve, first, last = CURVES[self.name], self.measured[0], self.measured[-1]
        lines = []
        for kind in ("seconds", "bytes"):
            own, expected = getattr(self, kind)()
            measured, wanted = self.exponents(kind)
            text = (lambda y: f"{y:.3g} s") if kind == "seconds" else (lambda y: f"{y / 2**20:,.0f} MiB")
            against = text(expected[len(own) - 1][1]) if kind == "bytes" else self._reached()
            mark = "**grows faster than its law**" if self.too_fast(kind) else ""
            lines.append(
                f"| {curve.title}: {curve.time if kind == 'seconds' else 'memory'} | {curve.x} {first.x:,} to {last.x:,} "
                f"| {text(own[0][1])} to {text(own[-1][1])} | {against} | {measured:.2f} | {wanted:.2f} | {mark} |"
            )
        return lines


def table(found: list[Found], peaks: dict[int, Peaks], threads: int) -> str:
    """Markdown."""
    machine = "; ".join(
        f"{count} thread{'s' * (count > 1)}: {peak.flops / 1e9:.0f} GFLOP/s, {peak.read / 1e9:.1f} GB/s read"
        for count, peak in sorted(peaks.items())
    )
    record = Record("growth", "", None, "")
    return "\n".join(
        [
            "| What | against | measured | law, at the last point | exponent | of the law | |",
            "| --- | --- | --- | --- | ---: | ---: | --- |",
            *(row for one in found for row in one.rows()),
            "",
            f"{record.date}, {record.machine}, {threads} threads, torch {record.versions['torch']}, fp32, llama-15m's shape. "
            f"Measured peaks: {machine}.",
        ]
    )


def picture(found: list[Found], path: Path) -> None:
    """Small multiples, time above memory: measured points, and the law as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    across = min(4, len(found))
    down = math.ceil(len(found) / across)
    style = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2 * down, across, figsize=(12, 4.6 * down), dpi=100, squeeze=False)
        for place in axes.flat[len(found) :]:
            place.set_visible(False)
        for number, one in enumerate(found):
            curve, row, column = CURVES[one.name], number // across, number % across
            for offset, (kind, divisor, unit) in enumerate((("seconds", 1.0, "s"), ("bytes", 2**20, "MiB"))):
                place = axes[2 * row + offset][column]
                place.set_visible(True)
                own, expected = getattr(one, kind)()
                fast = one.too_fast(kind)
                place.plot(*zip(*((x, y / divisor) for x, y in expected), strict=True), "--", color="0.45", label="law")
                place.plot(
                    *zip(*((x, y / divisor) for x, y in own), strict=True),
                    "o-", color="#c0392b" if fast else "#1f6f8b", markersize=4, label="measured",
                )  # fmt: skip
                place.set_xscale("log", base=2)
                place.set_yscale("log")
                ticks = [x for x, _ in expected]
                place.set_xticks(ticks, [f"{x:,}" for x in ticks])
                place.minorticks_off()
                place.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                place.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
                low = min(y for _, y in (*own, *expected)) / divisor
                high = max(y for _, y in (*own, *expected)) / divisor
                if high / low < 4:  # a narrow scale would make noise look like growth
                    place.set_ylim(low / 2, high * 2)
                place.set_ylabel(unit)
                measured, wanted = one.exponents(kind)
                place.set_title(f"{curve.title}: {'time' if kind == 'seconds' else 'memory'}", loc="left", fontsize=9)
                place.set_xlabel(curve.x + (f"; from {curve.beyond[0]} as plan has it" if curve.beyond else ""))
                told = f"exponent {measured:.2f}, law {wanted:.2f}"
                falls = own[-1][1] < own[0][1]
                place.text(
                    0.98, 0.97 if falls else 0.03, told, transform=place.transAxes, ha="right", va="top" if falls else "bottom",
                    color="#c0392b" if fast else "0.3",
                )  # fmt: skip
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def measured_curve(name: str, peaks: dict[int, Peaks], given: argparse.Namespace) -> Found:
    """All points of a curve; a line for each as it comes."""
    threads = 1 if name in ("ranks", "clients", "corpus") else given.threads
    curve, points = CURVES[name], []
    for x in curve.chosen(quick=given.quick):
        values = run_point(name, x, threads, 1 if given.quick else 2)
        expected = law(name, x, peaks[threads], values.get("prompt_tokens", 0))
        points.append(Point(x, values["seconds"], values["bytes"], expected))
        wanted = "" if expected.bytes is None else f" (law {expected.bytes / 2**20:,.0f})"
        print(
            f"{name:15} {x:6,}  {values['seconds']:9.4f} s (at the peak {expected.seconds:.4f})  "
            f"{values['bytes'] / 2**20:8,.0f} MiB{wanted}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return Found(name, points + [Point(x, None, None, law(name, x, peaks[1])) for x in curve.beyond])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--quick", action="store_true", help="two small points of each curve, one step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="default: docs/growth.png where all curves are measured whole")
    parser.add_argument("--points", type=Path, help=f"JSON lines are added here; default: {POINTS.relative_to(ROOT)}")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    records.add_json(parser)
    given = parser.parse_args()
    whole = not given.quick and set(given.only) == set(CURVES)
    peaks = {count: measure_peaks(count) for count in sorted({1, given.threads})}
    stamp = Record("growth", "", None, "")
    facts = {"date": stamp.date, "machine": stamp.machine, "versions": stamp.versions}
    found = []
    for name in given.only:
        try:
            found.append(measured_curve(name, peaks, given))
        except subprocess.CalledProcessError as error:  # the other curves are worth having
            print(f"{name}: not measured, a point ended with {error.returncode}", file=sys.stderr, flush=True)
    if not found:
        raise SystemExit("no curve was measured")
    whole = whole and len(found) == len(CURVES)
    text = table(found, peaks, given.threads)
    print(text)
    records.write(given.json, (record for one in found for record in one.records(given.threads)))
    points = given.points or (POINTS if whole else None)
    if points is not None:
        with points.open("a", encoding="utf-8") as file:
            for one in found:
                for point in one.points:
                    line = {"curve": one.name, **vars(point), "law": vars(point.law), "threads": given.threads, **facts}
                    file.write(json.dumps(line) + "\n")
    target = given.picture or (PICTURE if whole else None)
    if target is not None:
        picture(found, target)
    if given.write:
        shown = "" if target != PICTURE else "\n\n![Measured growth and its laws](growth.png)"
        records.between(DOCUMENT, "growth.py", text + shown)


if __name__ == "__main__":
    main()
