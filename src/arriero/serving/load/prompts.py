"""Real prompts to ask a server."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from arriero.data.row_files import read_rows
from arriero.data.rows.formats import sample_from_row
from arriero.data.samples import Sample
from arriero.errors import DataError

Conversation = Sequence[dict[str, Any]]


def read_conversations(data_file: str | None) -> list[Conversation]:
    """The prompts of a file, each as turns of a chat of which the user's is the last; without a file those of the package.

    Raises:
        DataError: a file that cannot be read, or holds no row; a row that is none.
    """
    if data_file is None:
        return [[{"role": "user", "content": text}] for text in _packaged()]
    rows = read_rows(Path(data_file).expanduser())
    found = [_conversation(sample_from_row(row, where, needs_target=False), where) for where, row in rows]
    if not found:
        raise DataError(f"{data_file}: holds no row")
    return found


def _conversation(sample: Sample, where: str) -> Conversation:
    if not sample.prompt.strip():
        raise DataError(f"{where}: there is no prompt in it")
    turns: list[dict[str, Any]] = [dict(turn) for turn in sample.history]
    return [*turns, {**sample.turn, "content": sample.prompt}]


def _packaged() -> list[str]:
    """A passage and its first question, of each passage of the quickstart: none begins like another."""
    file = resources.files("arriero") / "assets" / "quickstart" / "train.json"
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    passages = [passage for article in articles for passage in article["paragraphs"]]
    return [f"{passage['context']}\n\n{passage['qas'][0]['question']}" for passage in passages]


def shuffled(conversations: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """So many of them, all before any comes again: what a server has seen it may answer from its cache."""
    chance, found = random.Random(seed), list[Conversation]()
    while len(found) < count:
        found += chance.sample(list(conversations), min(len(conversations), count - len(found)))
    return found


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When requests arrive, in seconds from the first: a Poisson process (gaps are exponentially distributed).

    The same seed gives the same pattern at every rate, only faster.

    Args:
        rate: requests a second; 0: all at once.
    """
    chance, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(now)
        now += chance.expovariate(rate) if rate else 0.0
    return found
