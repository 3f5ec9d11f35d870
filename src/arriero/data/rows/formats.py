"""The kinds of rows by name, and how a row is told what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from arriero.data.rows.conversations import messages_row, sharegpt_row
from arriero.data.rows.prompts import alpaca_row, context_row, instruction_row, prompt_row, src_row, text_row
from arriero.data.rows.values import Row
from arriero.data.samples import Sample
from arriero.errors import DataError

Reader = Callable[[Row, str, bool], Sample]

# Format: the key without which a row is none of it, and its reader. A row without a named format is of the first whose
# key it has; `context`, `instruction`, `src` in PaddleNLP's order. `alpaca` has the keys of `instruction` and must be named.
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
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    for name, (key, reader) in FORMATS.items():
        if data_format in ("auto", name) and key in row:
            return replace(reader(row, where, needs_target), where=where)
    wanted = [key for name, (key, _) in FORMATS.items() if data_format in ("auto", name)]
    raise DataError(
        f"{where}: none of the keys {', '.join(dict.fromkeys(wanted))}: found {', '.join(map(str, row)) or 'nothing'}"
    )
