"""`arriero convert`: a model or adapter of any format into another one, compared with the original before it is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from arriero.config.converting import ConvertOptions

HELP = "Turn a model or adapter into another format, type or shard size: HF, GGUF, Paddle, Meta."

OPTIONS: tuple[type, ...] = (ConvertOptions,)


def run(options: ConvertOptions) -> int:
    """Convert and print the new folder or file."""
    from arriero.engine.conversion import convert

    with _bar() as progress:
        converted = convert(options, progress)
    for note in converted.notes:
        print(note, file=sys.stderr)
    print(converted.output)
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, in bytes; one appears when it takes longer than a second."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            close()
            bars[what] = tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, delay=1.0, disable=None)
        bars[what].update(done - bars[what].n)

    def close() -> None:
        for bar in bars.values():
            bar.close()

    try:
        yield progress
    finally:
        close()
