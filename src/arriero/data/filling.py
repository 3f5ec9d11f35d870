"""Micro-batches of a step by tokens: as many rows in each as fit, and the same number for every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arriero.data.corpus.best_fit import assign_best_fit


def fill(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[int]]:
    """Rows in as few groups of at most `budget` tokens as best-fit decreasing finds.

    With several processes, groups are split further until there are equally many for each, or every row is alone. The
    fullest come first, so that processes that take every so-many-th compute groups of like size at the same time.

    Args:
        lengths: tokens of each row, at least 1 each and at most `budget`.

    Returns:
        The rows' numbers in each group; ascending within a group.
    """
    if not lengths:
        return []
    sizes = np.asarray(lengths, np.int64)
    group_of = assign_best_fit(sizes, budget)
    groups: list[list[int]] = [[] for _ in range(int(group_of.max()) + 1)]
    for row, group in enumerate(group_of.tolist()):
        groups[group].append(row)

    def tokens(group: list[int]) -> int:
        return sum(lengths[row] for row in group)

    while len(groups) % processes and any(len(group) > 1 for group in groups):
        fullest = max((group for group in groups if len(group) > 1), key=tokens)
        groups.remove(fullest)
        groups += _halves(fullest, lengths)
    return [sorted(group) for group in sorted(groups, key=lambda group: (-tokens(group), group[0]))]


def _halves(group: list[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two groups of about as many tokens: from the longest row to the shortest, each into the emptier one."""
    halves: tuple[list[int], list[int]] = ([], [])
    filled = [0, 0]
    for row in sorted(group, key=lambda row: (-lengths[row], row)):
        emptier = int(filled[1] < filled[0])
        halves[emptier].append(row)
        filled[emptier] += lengths[row]
    return halves
