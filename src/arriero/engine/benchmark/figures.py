"""What the tables and pictures of all benchmarks have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from arriero.errors import ConfigError, require

Columns = Sequence[tuple[str, int]]  # names and widths


class Spread(Protocol):
    """Milliseconds of many requests."""

    @property
    def p50(self) -> float: ...

    @property
    def p99(self) -> float: ...


def heading(columns: Columns) -> str:
    """The line above a table."""
    return "  ".join(f"{name:>{width}}" for name, width in columns)


def table_line(cells: Iterable[str], columns: Columns) -> str:
    """A line of it."""
    return "  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))


def p50_p99(times: Spread | None) -> str:
    """A cell of it; empty where nothing was measured."""
    if times is None:
        return ""
    digits = 0 if times.p50 >= 10 else 1
    return f"{times.p50:,.{digits}f}/{times.p99:,.{digits}f}"


def new_picture(width: float, height: float) -> Any:
    """A matplotlib figure, in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def save_picture(picture: Any, path: Path, title: str) -> None:
    """Write it as a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    picture.suptitle(title, fontsize=7)
    try:
        picture.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror})") from error
