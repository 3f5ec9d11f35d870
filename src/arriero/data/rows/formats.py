"""The kinds of rows by name, and how a row is told what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from arriero.data.rows.conversations import messages_row, sharegpt_row
from arriero.data.rows.preferences import KTO_KEYS, is_pair, is_true_or_false
from arriero.data.rows.prompts import (
    alpaca_row,
    context_row,
    instruction_row,
    is_dolly,
    prompt_row,
    src_row,
    text_row,
)
from arriero.data.rows.values import Row, keys_of, kind_of
from arriero.data.samples import Sample
from arriero.errors import DataError

Reader = Callable[[Row, str, bool], Sample]

# Format: the key without which a row is none of it, and its reader. A row without a named format is of the first whose
# key it has, not null; `context`, `instruction`, `src` in PaddleNLP's order. `alpaca` has the keys of `instruction` and must
# be named.
STRIPPED = frozenset({"context", "instruction", "src"})  # PaddleNLP's, whose answers have no blanks around them
FORMATS: dict[str, tuple[str, Reader]] = {
    "messages": ("messages", messages_row),
    "sharegpt": ("conversations", sharegpt_row),
    "context": ("context", context_row),
    "instruction": ("instruction", instruction_row),
    "alpaca": ("instruction", alpaca_row),
    "src": ("src", src_row),
    "prompt": ("prompt", prompt_row),
    "text": ("text", text_row),
}


def sample_from_row(row: Any, where: str, *, data_format: str = "auto", needs_target: bool = True) -> Sample:
    """One row as a sample.

    Args:
        where: file and line.
        data_format: a name of `FORMATS`, or `auto`.

    Raises:
        DataError: naming `where` and what is missing.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {kind_of(row)}")
    name = data_format if data_format != "auto" else _told(row)
    key, reader = FORMATS.get(name, ("", None))
    pair = f"{where}: a pair of answers, one better than the other: --preference dpo (or ipo, simpo, orpo) learns from these"
    if reader is None or key not in row or (name == "src" and is_pair(row)):
        wanted = [key for key, _ in FORMATS.values()] if data_format == "auto" else [key]
        raise DataError(
            pair
            if is_pair(row)
            else f"{where}: none of the keys {', '.join(dict.fromkeys(wanted))}: found {keys_of(row)}"
            + ("; if 'data' holds your rows, write its list alone into the file, [...]" if "data" in row else "")
        )
    if needs_target and name != "text":
        _refuse_judged(row, where)
    try:
        sample = reader(row, where, needs_target)
    except DataError as error:
        if is_pair(row):  # some have an answer beside the pair, which can be learned
            raise DataError(pair) from error
        raise
    told = name if data_format == "auto" else ""
    return replace(sample, where=where, told=told, stripped=name in STRIPPED)


def _told(row: Row) -> str:
    """The format that a row's keys tell, "" if they tell none."""
    names = [name for name, (key, _) in FORMATS.items() if key in row and (name != "context" or not is_dolly(row))]
    # a set of rows of several formats, as a table, has null in the columns of the others
    filled = (name for name in names if row[FORMATS[name][0]] is not None)
    return next(filled, names[0] if names else "")


def _refuse_judged(row: Row, where: str) -> None:
    """Refuse an answer that is judged good or bad: a bad one would be learned like a good one."""
    for key in KTO_KEYS:
        if is_true_or_false(row.get(key)):
            raise DataError(
                f"{where}: '{key}' says whether the answer is good, as in rows for KTO, which is not supported: keep the rows "
                f"where it is true, and remove the key '{key}'"
            )
