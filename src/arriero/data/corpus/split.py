"""Which documents are for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.errors import DataError

SPLITS = ("train", "valid", "test")


def split_documents(documents: int, parts: Sequence[float]) -> tuple[range, range, range]:
    """The documents of training, validation and test: three neighbouring ranges of 0 .. documents - 1.

    The rule of the seed (`get_train_valid_test_split_` in PaddleNLP, the same in Megatron-LM): shares are rounded one by
    one, half to even, and what they miss or exceed is taken from all three ends. With few documents that can move an end
    below 0, which the seed then refuses to read; here the end is 0.

    Args:
        documents: number of documents, in file order.
        parts: three shares, in any unit.
    """
    total = sum(parts)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + round(part / total * float(documents)))
    excess = ends[-1] - documents
    first, second, third = (max(0, end - excess) for end in ends[1:])
    return range(first), range(first, second), range(second, third)


def check_not_empty(ranges: Sequence[range], wanted: Sequence[str], split: str, where: str) -> None:
    """Raises DataError when a part of the split that is asked for has no document, naming it and the counts of all."""
    for name, documents in zip(SPLITS, ranges, strict=True):
        if name in wanted and not documents:
            counts = ", ".join(f"{other} {len(r):,}" for other, r in zip(SPLITS, ranges, strict=True))
            raise DataError(
                f"{where}: --split {split} leaves no document for the {name} part ({counts} of {ranges[2].stop:,} "
                f"documents): give it a larger share, more documents, or do without it"
            )
