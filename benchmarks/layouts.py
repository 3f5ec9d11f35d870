"""The layout grid as a table: `make layouts` runs it and rewrites the table of docs/layouts.md.

    python benchmarks/layouts.py [--results FILE.jsonl] [--print]

The runs are those of tests/distributed/layout_grid.py, which the tests hold to 1e-5.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from records import processor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/distributed"))
from layout_grid import run_all
from layout_runs import LAYOUTS, read_lines

DOCUMENT = Path(__file__).parents[1] / "docs/layouts.md"
BEGIN, END = "<!-- made by make layouts: begin -->", "<!-- made by make layouts: end -->"
COLUMNS = {
    "loss": "loss",
    "norm": "gradient norm",
    "gradient": "gradients",
    "weight": "weights",
    "eval_loss": "eval loss",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: of each layout the largest relative differences from one process, over its cells.

    Raises:
        SystemExit: if a cell has no numbers.
    """
    broken = [line for line in results if "error" in line]
    if broken:
        raise SystemExit("\n".join(f"{line['name']}: {line['error']}" for line in broken))
    rows = [
        f"| Layout | processes | cells | {' | '.join(COLUMNS.values())} | right answers |",
        "| --- | ---: | ---: |" + " ---: |" * (len(COLUMNS) + 1),
    ]
    for layout, (world, _) in LAYOUTS.items():
        cells = [line for line in results if line["layout"] == layout]
        worst = " | ".join(f"{max(line[key] for line in cells):.0e}" for key in COLUMNS)
        same = all(line["accuracy"][0] == line["accuracy"][1] and line["agree"] for line in cells)
        rows.append(f"| {layout} | {world} | {len(cells)} | {worst} | {'the same' if same else 'others'} |")
    made = f"{datetime.date.today()}, {processor()}, Python {platform.python_version()}, torch {torch.__version__}, gloo, fp32"
    return "\n".join([*rows, "", f"{len(results)} cells; {made}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="of an earlier run, instead of running")
    parser.add_argument("--print", action="store_true", help="only print the table")
    given = parser.parse_args()
    if given.results:
        results = read_lines(given.results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            seconds = run_all(Path(folder), "every grid")
            results = read_lines(Path(folder) / "results.jsonl")
        print("; ".join(f"{world} processes: {took:.0f} s" for world, took in seconds.items()))
    made = table(results)
    print(made)
    if not given.print:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
