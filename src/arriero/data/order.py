"""The order in which rows are visited: a pure function of (seed, step), so that a run resumes exactly from its step number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from arriero.data.batch import MIN_SHARED_TOKENS, shared_prefix
from arriero.data.sft import Example
from arriero.errors import DataError


@lru_cache(maxsize=2)
def epoch_order(items: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The permutation of `items` items in one epoch, (items,) int64; PCG64 seeded with (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(items) if shuffle else np.arange(items)


def prefix_clusters(examples: Sequence[Example], largest: int) -> list[list[int]]:
    """Row numbers in runs of neighbours that begin alike, at most `largest` rows a run."""
    clusters: list[list[int]] = []
    for row, example in enumerate(examples):
        last = clusters[-1] if clusters else []
        together = 0 < len(last) < largest and shared_prefix(examples[last[0]], example) >= max(
            MIN_SHARED_TOKENS, example.prompt_length // 2
        )
        if together:
            last.append(row)
        else:
            clusters.append([row])
    return clusters


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
    ) -> None:
        if rows < 1:
            raise DataError("the training set is empty")
        self.rows, self.seed, self.shuffle, self.clusters = rows, seed, shuffle, clusters
        self.micro_batch_size, self.rows_per_step = micro_batch_size, micro_batch_size * accumulation * processes
        self.steps_per_epoch = math.ceil(rows / self.rows_per_step)

    def _rows(self, epoch: int) -> list[int]:
        if self.clusters is None:
            return list(epoch_order(self.rows, self.seed, epoch, self.shuffle).tolist())
        order = epoch_order(len(self.clusters), self.seed, epoch, self.shuffle)
        return [row for cluster in order.tolist() for row in self.clusters[cluster]]

    def __call__(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step number `step` (from 0), of all processes: each a list of row numbers."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._rows(epoch)[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        return [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
