"""The files that `arriero bench` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arriero.config.bench import BenchOptions
from arriero.errors import require
from arriero.output_file import check_place, write_file


def check_files(bench: BenchOptions) -> None:
    """What would be in vain is refused before anything is loaded or asked."""
    for name, value in (("--output_file", bench.output_file), ("--plot", bench.plot)):
        if value is not None:
            check_place(Path(value).expanduser(), name)
    if bench.plot is not None:
        require("matplotlib.figure", "plot")


def write_files(bench: BenchOptions, found: Mapping[str, Any], draw: Callable[[Path], None]) -> None:
    """Write --output_file and --plot, where they are asked for.

    Args:
        found: everything, for JSON.
        draw: makes the picture.
    """
    if bench.output_file is not None:
        write_file(Path(bench.output_file).expanduser(), json.dumps(found, indent=1) + "\n", "--output_file")
    if bench.plot is not None:
        draw(Path(bench.plot).expanduser())
