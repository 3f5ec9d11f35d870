"""Steps of one token for each of a few sequences by `CompiledRows`; a number of rows from a ladder, filled up.

More rows than the ladder has are computed in groups of like lengths. That reads the weights once for each group, and is still
faster than the ordinary way, which attends sequence by sequence (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arriero.engine.work import Work
from arriero.models.compiled_rows import ROWS, CompiledRows
from arriero.models.packed_model import PackedModel
from arriero.models.paged_cache import PagedCache

logger = logging.getLogger(__name__)

# Sequences are read as long as the longest, in steps of so many tokens; where that is too much more than there is of them, the
# step is computed in the ordinary way.
LENGTH_STEP = 16
MOST_PADDING = 1024
MOST_ROWS = 32


class CompiledSteps:
    """Computes such steps, as long as they can be compiled."""

    def __init__(self, rows: CompiledRows, model: PackedModel, cache: PagedCache) -> None:
        """
        Args:
            model: says when weights have changed.
        """
        self._rows: CompiledRows | None = rows
        self._model, self._cache = model, cache
        self._packings = model.refresh()

    def prepare(self) -> None:
        """Compile for every number of rows now, and not when a step first has it; only while no sequence is in the cache."""
        for rows in ROWS:
            self.run([Work([0], 0, [0], 1)] * rows)

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether a step is one of these."""
        if self._rows is None or not 0 < len(work) <= MOST_ROWS:
            return False
        if any(len(item.tokens) != 1 or item.logits != 1 for item in work):
            return False
        lengths = [[work[i].start + 1 for i in group] for group in _groups(work)]
        padded = sum(len(own) * max(own) for own in lengths)
        return padded <= 2 * sum(map(sum, lengths)) + MOST_PADDING

    def run(self, work: Sequence[Work]) -> Tensor | None:
        """The logits of each sequence's one token, (R, vocab_size); None if they cannot be compiled, which is said once."""
        packings, rows = self._model.refresh(), self._rows
        if rows is None:
            return None
        if packings != self._packings:
            self._packings = packings
            rows.tile()
        groups = _groups(work)
        try:
            found = [self._logits(rows, [work[i] for i in group]) for group in groups]
        except RuntimeError as error:
            logger.warning("decoding goes on without torch.compile: %s", str(error).strip().partition("\n")[0])
            self._rows = None  # with its weights
            return None
        if len(found) == 1:
            return found[0]
        order = torch.tensor([i for group in groups for i in group])
        return torch.empty(len(work), found[0].shape[1]).index_copy_(0, order, torch.cat(found))

    def _logits(self, rows: CompiledRows, work: Sequence[Work]) -> Tensor:
        count = next(count for count in ROWS if count >= len(work))
        # a row that fills up is the last one again, which writes the same to the same place
        filled = [*work, *[work[-1]] * (count - len(work))]
        positions = [item.start for item in filled]
        slots = self._slots(filled)
        new = slots[range(count), positions].copy()
        arrays = (np.array([item.tokens[0] for item in filled]), np.array(positions), slots, new)
        tokens, starts, places, news = (torch.from_numpy(array) for array in arrays)
        return rows.logits(tokens, starts, places, news, self._cache)[: len(work)]

    def _slots(self, work: Sequence[Work]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Of `RowPlaces`."""
        size = self._cache.block_size
        longest = max(item.start for item in work) + 1
        width = -(-longest // LENGTH_STEP) * LENGTH_STEP
        slots = np.empty((len(work), width), np.int64)
        for row, item in zip(slots, work, strict=True):
            end = item.start + 1
            blocks = np.array(item.blocks[: -(-end // size)], np.int64)
            row[:end] = (blocks[:, None] * size + np.arange(size)).reshape(-1)[:end]
            row[end:] = row[item.start]
        return slots


def _groups(work: Sequence[Work]) -> list[list[int]]:
    """Places in the work, in groups of as many as are computed at once."""
    if len(work) <= ROWS[-1]:
        return [list(range(len(work)))]
    order = sorted(range(len(work)), key=lambda i: work[i].start)
    return [order[at : at + ROWS[-1]] for at in range(0, len(order), ROWS[-1])]
