"""Text as blocks of tokens: to calibrate on, and to measure perplexity on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arriero.config.row_lengths import RowLengths
from arriero.data.row_files import SUFFIXES
from arriero.data.samples import Sample
from arriero.data.sft import encode_sample
from arriero.data.sources import read_samples
from arriero.data.tokenizer import Tokenizer
from arriero.errors import DataError, TemplateError

MAX_HELD = 64
_PIECE = 1 << 20  # characters read at once
_HELD_SHARE = 10  # one block of so many is held out


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of tokens, (1, length) int64 each.

    Attributes:
        calibration: spread evenly over the text before the held part.
        held: the end of what was read.
    """

    calibration: list[Tensor]
    held: list[Tensor]


def read_blocks(path: str | Path, tokenizer: Tokenizer, samples: int, length: int) -> TextBlocks:
    """Cut a file's text into blocks; rows follow one another with an end-of-sequence token between them.

    Conversations are encoded as fine-tuning does it, by the chat template; of other rows prompt and answer are one text.

    No more is read than is needed for `samples` blocks with as many again, and the held ones.

    Args:
        samples: at most so many to calibrate on.
        length: tokens of a block.

    Raises:
        DataError: if the file cannot be read, or its text is too short for a block of each kind.
        TemplateError: if the chat template refuses a row, which is named.
    """
    path = Path(path)
    wanted = (2 * samples + MAX_HELD) * length
    ids: list[int] = []
    for found in _pieces(path, tokenizer):
        ids += found
        if len(ids) >= wanted:
            break
    count = min(len(ids), wanted) // length
    if count < 2:
        raise DataError(
            f"{path}: holds {len(ids)} tokens, at least {2 * length} are needed: give more text or a smaller "
            "--calibration_length"
        )
    blocks = list(torch.tensor(ids[: count * length]).view(count, 1, length))
    held = min(MAX_HELD, max(1, count // _HELD_SHARE))
    before = blocks[:-held]
    used = min(samples, len(before))
    return TextBlocks([before[number * len(before) // used] for number in range(used)], blocks[-held:])


def check_text(path: str | Path) -> None:
    """Look for the file, before the work that needs its text.

    Raises:
        DataError: there is none that can be read.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"--data_file {path}: is a folder: name a file of text or rows")
    if not path.is_file():
        raise DataError(f"--data_file {path}: no such file")
    if not os.access(path, os.R_OK):
        raise DataError(f"--data_file {path}: cannot be read (Permission denied)")


def _pieces(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each row, or of each piece of plain text."""
    check_text(path)
    if path.suffix.lower() in SUFFIXES:
        for sample in read_samples(path, None):
            ids, end = _row_ids(sample, tokenizer), tokenizer.eos_token_id
            yield ids if end is None or ids[-1:] == [end] else [*ids, end]
        return
    try:
        with path.open(encoding="utf-8") as file:
            while text := file.read(_PIECE):
                yield tokenizer.encode(text + file.readline())  # tokens do not cross lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data_file {path}: cannot be read as UTF-8 text ({error})") from error


def _row_ids(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    if not (sample.chat or sample.history):
        return tokenizer.encode(sample.prompt + (sample.target or ""))
    try:
        return encode_sample(sample, tokenizer, RowLengths(sys.maxsize, sys.maxsize))[0].input_ids
    except TemplateError as error:
        raise TemplateError(f"{sample.name}: {error}") from error
