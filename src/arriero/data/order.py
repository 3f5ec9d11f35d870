"""The order in which rows are visited: a pure function of (seed, step), so that a run resumes exactly from its step number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from arriero.data.batch import MIN_SHARED_TOKENS, shared_prefix
from arriero.data.filling import fill
from arriero.data.mixture import Mixture
from arriero.data.sft import Example
from arriero.errors import DataError

# a beginning of more rows is no passage (SQuAD: up to 25 questions on one)
MAX_PASSAGE_ROWS = 64
MAX_PASSAGE_SHARE = 1 / 8


@lru_cache(maxsize=2)
def epoch_order(items: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The permutation of `items` items in one epoch, (items,) int64; PCG64 seeded with (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(items) if shuffle else np.arange(items)


def common_beginnings(examples: Sequence[Example], most: int) -> np.ndarray:
    """Of each row, the tokens of its longest beginning that more than `most` rows have, (rows,) int64."""
    rows = len(examples)
    # rows that begin alike follow each other in this order, so that of `most` + 1 neighbours the first and the last tell
    ranked = sorted(range(rows), key=lambda row: examples[row].input_ids)
    shared = np.zeros(rows + most, dtype=np.int64)  # by the last of the neighbours
    for last in range(most, rows):
        shared[last] = shared_prefix(examples[ranked[last - most]], examples[ranked[last]])
    common = np.empty(rows, dtype=np.int64)
    common[ranked] = np.lib.stride_tricks.sliding_window_view(shared, most + 1).max(axis=1)
    return common


def prefix_clusters(examples: Sequence[Example], largest: int) -> list[list[int]]:
    """Row numbers in runs of neighbours that begin alike, at most `largest` rows a run.

    What counts is what they have in common beyond a beginning of many rows. Such a one is no passage but a chat template's text
    or a system message: shuffled by it, a file that is sorted by topic would give micro-batches of one topic each.
    """
    common = common_beginnings(examples, min(MAX_PASSAGE_ROWS, int(len(examples) * MAX_PASSAGE_SHARE))).tolist()
    clusters: list[list[int]] = []
    for row, example in enumerate(examples):
        last = clusters[-1] if clusters else []
        together = 0 < len(last) < largest and shared_prefix(examples[last[0]], example) - common[row] >= max(
            MIN_SHARED_TOKENS, (example.prompt_length - common[row]) // 2
        )
        if together:
            last.append(row)
        else:
            clusters.append([row])
    return clusters


def describe_clusters(clusters: Sequence[Sequence[int]]) -> str:
    """What is told of rows that are shuffled together; empty where none are."""
    together = [len(cluster) for cluster in clusters if len(cluster) > 1]
    if not together:
        return ""
    return (
        f"{sum(together):,} of {sum(map(len, clusters)):,} training rows begin alike in {len(together):,} groups, which are "
        "shuffled whole (--share_prefixes no: row by row)"
    )


def grouped_by_length(order: Sequence[int], lengths: Sequence[int], rows_per_step: int) -> list[int]:
    """Shuffled rows, brought into an order in which neighbours are of like length.

    As `get_length_grouped_indices` of transformers: the rows are cut into runs of at most 50 steps, a run is sorted from the
    longest row to the shortest, and the longest row of all goes first, so that memory runs out in the first step if at all.
    """
    steps = min(len(order) // (4 * rows_per_step), 50) or 1
    size = steps * rows_per_step
    runs = [sorted(order[i : i + size], key=lambda row: -lengths[row]) for i in range(0, len(order), size)]
    longest = max(range(len(runs)), key=lambda run: lengths[runs[run][0]])
    runs[0][0], runs[longest][0] = runs[longest][0], runs[0][0]
    return [row for run in runs for row in run]


class StepOrder:
    """Which rows each optimizer step sees.

    A step is up to `accumulation` micro-batches for each of `processes`, of up to `micro_batch_size` rows. An epoch visits
    every row once; its last micro-batch and its last step may be smaller, and no step straddles two epochs. With
    `clusters`, whole runs of rows are shuffled instead of single ones.
    """

    def __init__(
        self,
        rows: int,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        *,
        processes: int = 1,
        shuffle: bool = True,
        clusters: list[list[int]] | None = None,
        mixture: Mixture | None = None,
        lengths: Sequence[int] | None = None,
        group_by_length: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """
        Args:
            mixture: draws the rows of an epoch from several data sets; not with `clusters`.
            lengths: tokens of each row; what follows needs them.
            group_by_length: rows of like length into one step; not with `clusters`.
            max_tokens: micro-batches of up to so many tokens instead of `micro_batch_size` rows. A step has the same rows.

        Raises:
            DataError: there is no row, or one has more than `max_tokens`.
        """
        if rows < 1:
            raise DataError("the training set is empty")
        if lengths is not None and max_tokens is not None and max(lengths) > max_tokens:
            row = max(range(rows), key=lambda row: lengths[row])
            raise DataError(
                f"training row {row} (counted from 0) has {lengths[row]} tokens, --max_tokens_per_batch allows {max_tokens}: "
                "raise it, or lower --src_length"
            )
        self.rows, self.seed, self.shuffle, self.clusters = rows, seed, shuffle, clusters
        self.micro_batch_size, self.rows_per_step = micro_batch_size, micro_batch_size * accumulation * processes
        self.steps_per_epoch = math.ceil(rows / self.rows_per_step)
        self.processes, self.mixture = processes, mixture
        self.lengths, self.group_by_length, self.max_tokens = lengths or (), group_by_length, max_tokens
        self._last: tuple[int, list[int]] = (-1, [])  # an epoch and its rows

    def _rows(self, epoch: int) -> list[int]:
        if self._last[0] != epoch:
            self._last = (epoch, self._order(epoch))
        return self._last[1]

    def _order(self, epoch: int) -> list[int]:
        if self.clusters is not None:
            order = epoch_order(len(self.clusters), self.seed, epoch, self.shuffle)
            return [row for cluster in order.tolist() for row in self.clusters[cluster]]
        rows: list[int] = epoch_order(self.rows, self.seed, epoch, self.shuffle).tolist()
        if self.mixture is not None:
            drawn = self.mixture.epoch(epoch, self.seed)
            rows = [drawn[place] for place in rows]
        return grouped_by_length(rows, self.lengths, self.rows_per_step) if self.group_by_length else rows

    def variation(self) -> dict[str, Any]:
        """What besides rows, seed and clusters decides which rows a step has, as JSON; empty by default."""
        varied: dict[str, Any] = {}
        if self.mixture is not None:
            varied["mixture"] = {"rows": list(self.mixture.rows), "weights": list(self.mixture.weights)}
        if self.group_by_length:
            varied["group_by_length"] = True
        return varied

    def __call__(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step number `step` (from 0), of all processes: each a list of row numbers."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._rows(epoch)[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        if self.max_tokens is None:
            return [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
        groups = fill([self.lengths[row] for row in rows], self.max_tokens, self.processes)
        return [[rows[place] for place in group] for group in groups]
