"""What a benchmark found, as every program writes it with `--json FILE`: one JSON object a line, all of the same shape."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("arriero", "torch", "transformers", "peft", "tokenizers", "datasets", "onnxruntime")


def processor() -> str:
    """E.g. "2 cores, Intel Xeon ..."."""
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores, {name}"


def versions(*more: str) -> dict[str, str]:
    """Of Python and of the packages that are installed here."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Record:
    """One figure, and its peer's where it has one.

    Attributes:
        program: of benchmarks/, without ".py".
        what: measured, in words that do not change from run to run.
        ours, peer: medians of the rounds; None where there is none, `note` says why.
        unit: of both.
        peer_name: who the other is.
        ratios: of each round; above 1 ours is better.
        note: what else is to be known.
    """

    program: str
    what: str
    ours: float | None
    unit: str
    peer_name: str = ""
    peer: float | None = None
    ratios: tuple[float, ...] = ()
    threads: int = 2
    dtype: str = "fp32"
    note: str = ""
    date: str = field(default_factory=lambda: str(date.today()))
    machine: str = field(default_factory=processor)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def of_rounds(
        cls, program: str, what: str, unit: str, ours: Sequence[float], theirs: Sequence[float], **more: Any
    ) -> Record:
        """Of figures where more is better, a round of both sides beside each other."""
        ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
        return cls(program, what, median(ours), unit, peer=median(theirs), ratios=ratios, **more)

    @classmethod
    def of_costs(
        cls, program: str, what: str, unit: str, ours: Sequence[float], theirs: Sequence[float], **more: Any
    ) -> Record:
        """Of figures where less is better: seconds, bytes."""
        ratios = tuple(b / a for a, b in zip(ours, theirs, strict=True))
        return cls(program, what, median(ours), unit, peer=median(theirs), ratios=ratios, **more)

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that all programs have."""
    parser.add_argument("--json", type=Path, help="add what is found to this file, a JSON object a line")


def write(path: Path | None, records: Iterable[Record]) -> None:
    """Add records to a file; nothing without one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def show(records: Iterable[Record]) -> None:
    """A line each, beside the peer."""
    for record in records:
        rounds = ", ".join(f"{ratio:.2f}" for ratio in record.ratios)
        print(
            f"{record.what}: {record.ours:.2f} against {record.peer:.2f} {record.unit}, ratio {record.ratio:.2f} ({rounds})"
        )


def read(path: Path) -> list[Record]:
    """All records of a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Record(**{**values, "ratios": tuple(values["ratios"])}) for values in map(json.loads, lines)]


def between(document: Path, name: str, text: str) -> None:
    """Rewrite what stands in a page between the two marks of a name.

    Raises:
        SystemExit: the page does not have them.
    """
    begin, end = (f"<!-- made by benchmarks/{name}: {word} -->" for word in ("begin", "end"))
    page = document.read_text(encoding="utf-8")
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{document}: has no part between {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
