"""Which prompt goes into which row of the cache, and what of it the cache holds already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from arriero.models.cache import ContiguousCache

# Below this many tokens in common, computing them again costs less than another forward pass.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class PrefillJob:
    """The tokens of a prompt that one forward pass computes.

    Attributes:
        row: where they go.
        start: how many tokens the row holds already.
        tokens: the tokens.
        last: whether the prompt ends with them.
    """

    row: int
    start: int
    tokens: list[int]
    last: bool


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    low, high = 0, min(len(a), len(b))
    # Bisection over slices: list comparison runs in C, a loop over tokens would not.
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class RowPool:
    """Rows of a cache, in use or free. A free row keeps its last prompt, so that a later one can build on it.

    Prompts that begin alike (questions about one passage, one system message) compute the common part once: the first
    of them computes it, the others copy keys and values. The row count only ever shrinks.
    """

    def __init__(self, cache: ContiguousCache) -> None:
        self.cache = cache
        self._held: list[list[int]] = [[] for _ in range(cache.batch)]

    @torch.inference_mode()
    def place(
        self, prompts: Sequence[list[int]], free: Sequence[int]
    ) -> Iterator[tuple[dict[int, int], list[PrefillJob]]]:
        """Give each prompt a free row, in rounds: what a round computes, the next one builds on.

        The caller must run a round's jobs before it asks for the next round.

        Yields:
            ({index into `prompts`: row}, the jobs), at most one job a prompt.
        """
        rows = list(free)
        before = self.cache.prefix_length  # counted in a row's length, not in its prompt
        waiting = list(range(len(prompts)))
        while waiting:
            placed: dict[int, int] = {}
            jobs: list[PrefillJob] = []
            later: list[int] = []
            for index in waiting:
                prompt = prompts[index]
                source, shared = self._best_source(prompt, set(placed.values()))
                coming = max((common_prefix(prompt, prompts[other]) for other in placed), default=0)
                if min(coming, len(prompt) - 1) >= shared + MIN_SHARED_TOKENS:
                    later.append(index)
                    continue
                row = source if source in rows else rows[0]
                rows.remove(row)
                self.cache.copy_prefix(source, row, before + shared)
                self._held[row] = prompt
                placed[index] = row
                jobs.append(PrefillJob(row, before + shared, prompt[shared:], last=True))
            yield placed, jobs
            waiting = later

    def _best_source(self, prompt: list[int], busy: set[int]) -> tuple[int, int]:
        """The row that holds most of a prompt's beginning, and how much of it; never all, the last token must be run.

        Args:
            busy: rows of this round, which do not hold their prompt yet.
        """
        best, most = 0, 0
        for row, held in enumerate(self._held):
            if row in busy:
                continue
            shared = min(common_prefix(prompt, held), len(prompt) - 1)
            if shared > most:
                best, most = row, shared
        return (best, most) if most >= MIN_SHARED_TOKENS else (best, 0)

    @torch.inference_mode()
    def drop(self, row: int) -> int:
        """Remove a row by moving the last one into its place; returns the index that the last one had."""
        last = self.cache.batch - 1
        if row != last:
            self.cache.copy_prefix(last, row, self.cache.lengths[last])
            self._held[row] = self._held[last]
        self._held.pop()
        self.cache.select(range(last))
        return last


def split_jobs(jobs: Sequence[PrefillJob], budget: int) -> Iterator[list[PrefillJob]]:
    """Pack jobs into forward passes of at most `budget` tokens; a longer prompt is spread over several."""
    batch: list[PrefillJob] = []
    room = budget
    for job in jobs:
        if room < len(job.tokens) <= budget:
            yield batch
            batch, room = [], budget
        done = 0
        while done < len(job.tokens):
            count = min(room, len(job.tokens) - done)
            last = done + count == len(job.tokens)
            batch.append(PrefillJob(job.row, job.start + done, job.tokens[done : done + count], last))
            done += count
            room -= count
            if room == 0:
                yield batch
                batch, room = [], budget
    if batch:
        yield batch
