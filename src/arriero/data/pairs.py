"""Pairs of answers as training data: two rows each, which stand beside each other in a batch.

The rows of a pair begin with the same prompt, so that its tokens stand in the batch and are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from arriero.config.row_lengths import RowLengths
from arriero.data.batch import MIN_SHARED_TOKENS, Batch, LazyBatches, PairedRows, pack_groups, shared_prefix
from arriero.data.order import StepOrder
from arriero.data.prompt_tokens import SFTTokenizer
from arriero.data.row_files import read_rows
from arriero.data.rows.preferences import PairSample, pair_from_row
from arriero.data.sft import Example, encode_sample, is_empty
from arriero.data.sources import files_of, read_splits, rows_of_splits
from arriero.data.steps import DataShare, OrderedSteps, digest_of
from arriero.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, ready for training; the labels are those of the answers only."""

    chosen: Example
    rejected: Example

    @property
    def rows(self) -> tuple[Example, Example]:
        return self.chosen, self.rejected


@dataclass
class PairReport:
    """What happened to the pairs: nothing is cut without being counted here."""

    pairs: int = 0
    truncated_context: int = 0
    truncated_target: int = 0
    equal: int = 0
    empty: int = 0
    bare: int = 0  # text, though the model has a chat template
    tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        text = f"{self.pairs:,} pairs, {self.tokens:,} tokens, longest row {self.longest:,}"
        if self.truncated_context:
            text += f"; {self.truncated_context:,} contexts cut to fit src_length"
        if self.truncated_target:
            text += f"; {self.truncated_target:,} answers cut to fit tgt_length"
        if self.equal:
            text += f"; warning: {self.equal:,} pairs have two equal answers, of which nothing can be preferred"
        if self.empty:
            text += f"; warning: {self.empty:,} pairs have an empty answer"
        if self.bare:
            text += (
                f"; {self.bare:,} pairs are bare text, while chat and serve ask through the model's chat template: pairs whose "
                "`prompt` is a list of turns, or with `instruction`, use it too"
            )
        return text


def load_pairs(
    dataset_path: str, splits: Sequence[str], limits: Mapping[str, int | None], val_size: float | None = None
) -> dict[str, list[PairSample]]:
    """The pairs of the wanted splits ("train", "dev") of a file or folder, or of several with commas between them.

    Args:
        limits, val_size: see `rows_of_splits`.

    Raises:
        ConfigError: if the place does not hold a split.
        DataError: if a row cannot be used.
    """
    files = files_of(dataset_path, read_splits(splits, val_size))
    parts = {split: [read_pairs(path) for path in paths] for split, paths in files.items()}
    found = rows_of_splits(parts, list(map(str, files.get("train", []))), splits, limits, val_size)
    return {split: [pair for pairs in files_pairs for pair in pairs] for split, files_pairs in found.items()}


def read_pairs(path: Path) -> list[PairSample]:
    """Every row of one file.

    Raises:
        DataError: if the file is missing, malformed or without a row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    pairs = [pair_from_row(row, where) for where, row in read_rows(path)]
    if not pairs:
        raise DataError(f"{path}: holds no pair to learn from")
    return pairs


def encode_pairs(
    samples: Iterable[PairSample], tokenizer: SFTTokenizer, lengths: RowLengths
) -> tuple[list[Pair], PairReport]:
    """Every pair as token ids, with the report of what was cut.

    Args:
        lengths: of prompts and answers.
    """
    pairs: list[Pair] = []
    report = PairReport()
    for sample in samples:
        encoded = _encoded(sample, tokenizer, lengths)
        rows = [row for row, *_ in encoded]
        for row, _, target_cut in encoded:
            report.tokens += row.length
            report.longest = max(report.longest, row.length)
            report.truncated_target += target_cut
        report.truncated_context += encoded[0][1]  # the prompt of both
        report.empty += any(is_empty(answer) for answer in (sample.chosen, sample.rejected))
        report.bare += tokenizer.has_chat_template() and not sample.chosen.chat
        report.equal += rows[0].input_ids == rows[1].input_ids
        pairs.append(Pair(*rows))
        report.pairs += 1
    return pairs, report


def _encoded(sample: PairSample, tokenizer: SFTTokenizer, lengths: RowLengths) -> list[tuple[Example, bool, bool]]:
    """The rows of both answers, see `encode_sample`; their prompt is the one that the longer answer leaves room for."""

    def encoded(within: RowLengths) -> list[tuple[Example, bool, bool]]:
        answers = (sample.chosen, sample.rejected)
        return [encode_sample(answer, tokenizer, within, train_on="last") for answer in answers]

    rows = encoded(lengths)
    sizes = {row.prompt_length for row, *_ in rows}
    if len(sizes) == 1 or not any(cut for _, cut, _ in rows):
        return rows
    return encoded(replace(lengths, longest_prompt=min(sizes)))


def fingerprint(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the token ids and labels of all pairs, in their order."""
    return digest_of(row for pair in pairs for row in pair.rows)


def pack_pairs(pairs: Sequence[Pair], reference: Tensor | None = None, *, share_prefixes: bool = True) -> Batch:
    """The pairs as one packed batch of two rows each.

    Args:
        reference: (pairs, 2) fp32, log-probabilities of the answers by the reference model.
        share_prefixes: whether the prompt of a pair stands once.
    """
    groups: list[tuple[int, Sequence[Example]]] = []
    for pair in pairs:
        shared = shared_prefix(*pair.rows) if share_prefixes else 0
        groups += [(shared, pair.rows)] if shared >= MIN_SHARED_TOKENS else [(0, [row]) for row in pair.rows]
    tokens = tuple(row.label_count for pair in pairs for row in pair.rows)
    return replace(pack_groups(groups), pairs=PairedRows(tokens, reference))


def pair_batches(
    pairs: Sequence[Pair], size: int, reference: Tensor | None = None, *, share_prefixes: bool
) -> LazyBatches:
    """All pairs in order, `size` pairs a batch."""

    def make(number: int) -> Batch:
        run = slice(number * size, (number + 1) * size)
        return pack_pairs(pairs[run], None if reference is None else reference[run], share_prefixes=share_prefixes)

    return LazyBatches(-(-len(pairs) // size), make)


@dataclass(frozen=True)
class PreferenceSteps(OrderedSteps):
    """The pairs of every step (see `arriero.data.steps.StepSource`). A pair is never in two micro-batches.

    Attributes:
        order: the pairs of every step, of all processes; a row there is a pair.
        reference: (pairs, 2) fp32 of all pairs, where the objective needs it.
    """

    pairs: Sequence[Pair]
    order: StepOrder
    reference: Tensor | None = None
    share_prefixes: bool = True
    share: DataShare = field(default_factory=DataShare)

    def batch_of(self, rows: Sequence[int]) -> Batch:
        reference = None if self.reference is None else self.reference[list(rows)]
        return pack_pairs([self.pairs[row] for row in rows], reference, share_prefixes=self.share_prefixes)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "pairs": self.order.rows,
            "pairs_per_step": self.order.rows_per_step,
            "seed": self.order.seed,
            "content": fingerprint(self.pairs)[:16],
        }

    def describe(self, step: int) -> str:
        micro_batches = self.order(step)
        found = [pair for number in self.share.of(len(micro_batches)) for pair in micro_batches[number]]
        if not found:
            return "no training pairs"
        shown = ", ".join(map(str, found[:16])) + (", ..." if len(found) > 16 else "")
        return f"training pairs {shown} (counted from 0)"
