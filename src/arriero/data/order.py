"""The order in which rows are visited: a pure function of (seed, step), so that a run resumes exactly from its step number."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from arriero.errors import DataError


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The permutation of `rows` rows in one epoch, (rows,) int64; PCG64 seeded with (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(rows) if shuffle else np.arange(rows)


class StepOrder:
    """Which rows each optimizer step sees.

    A step is up to `accumulation` micro-batches of up to `micro_batch_size` rows. An epoch visits every row once; its last
    micro-batch and its last step may be smaller, and no step straddles two epochs.
    """

    def __init__(self, rows: int, micro_batch_size: int, accumulation: int, seed: int, *, shuffle: bool = True) -> None:
        if rows < 1:
            raise DataError("the training set is empty")
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.micro_batch_size, self.rows_per_step = micro_batch_size, micro_batch_size * accumulation
        self.steps_per_epoch = math.ceil(rows / self.rows_per_step)

    def __call__(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step number `step` (from 0), each a list of row numbers."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.rows, self.seed, epoch, self.shuffle)
        rows = order[index * self.rows_per_step : (index + 1) * self.rows_per_step].tolist()
        return [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
