"""Several data sets as one, in given shares: which rows an epoch has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arriero.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Data sets whose rows follow each other, and how often each is drawn from.

    An epoch has as many rows as all data sets together. Each data set gives its share of them: rows of its own endless
    sequence of shuffled passes, which goes on where the epoch before stopped. So no row comes a second time before all of its
    data set came once, and over epochs a small share visits all rows too.

    Attributes:
        rows: of each data set.
        weights: of each, in proportion.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for number, quota in enumerate(self.quotas):
            if quota == 0:
                raise DataError(
                    f"a weight of {self.weights[number]:g} gives less than one of {self.rows_per_epoch} rows an epoch to "
                    f"data set number {number + 1} of --dataset_path: raise it or leave the file out"
                )

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.rows)

    @property
    def quotas(self) -> list[int]:
        """Rows of each data set in an epoch, by the largest remainder."""
        total = self.rows_per_epoch
        exact = [total * weight / sum(self.weights) for weight in self.weights]
        quotas = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
        for i in by_remainder[: total - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def epoch(self, number: int, seed: int) -> list[int]:
        """The rows of an epoch (from 0) in the order to be shuffled: those of one data set after the other's."""
        chosen: list[int] = []
        first = 0
        for part, (rows, quota) in enumerate(zip(self.rows, self.quotas, strict=True)):
            start, stop = number * quota, (number + 1) * quota
            for turn in range(start // rows, -(-stop // rows)):
                order = np.random.default_rng((seed, turn, part + 1)).permutation(rows)
                begin, end = max(start - turn * rows, 0), min(stop - turn * rows, rows)
                chosen += (first + order[begin:end]).tolist()
            first += rows
        return chosen


def describe(paths: Sequence[str], rows: Sequence[int], mixture: Mixture | None) -> str:
    """A line for each data set: its rows, and how many of them an epoch has."""
    quotas = mixture.quotas if mixture else rows
    total = sum(quotas)
    return "\n".join(
        f"  {path}: {count:,} rows, {quota:,} an epoch ({100 * quota / total:.1f} %)"
        for path, count, quota in zip(paths, rows, quotas, strict=True)
    )
