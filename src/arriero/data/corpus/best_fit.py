"""Samples filled with whole documents: best-fit packing.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), section 3.2: documents longer than a
sample are cut into full pieces, and all pieces are packed by best-fit decreasing: from the longest to the shortest, each
into the fullest sample that still has room for it. Documents that fit are never cut.

Pieces of one length are placed together: samples are kept in groups by their free room, and while they are not used up, all
pieces go into the group of the least sufficient room, as many into each sample as fit. That is what the one-by-one rule
does, since after a piece is placed, its sample is still the fullest with room, or has no room for another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ALGORITHM = 1


def pack_best_fit(lengths: NDArray[Any], offsets: NDArray[Any], capacity: int) -> dict[str, NDArray[Any]]:
    """Pack documents into samples of at most `capacity` tokens.

    Args:
        lengths: (D,) tokens of each document; empty ones are left out.
        offsets: (D,) place of its first token in the corpus.
        capacity: tokens of a sample.

    Returns:
        `piece_start` (P,) int64, place of a piece's first token; `piece_length` (P,) int32; `sample_pieces` (N + 1,) int64:
        sample n holds the pieces sample_pieces[n] .. sample_pieces[n + 1] - 1, in the order of the corpus.
    """
    starts, sizes = cut_documents(lengths, offsets, capacity)
    sample = assign_best_fit(sizes, capacity)
    order = np.argsort(sample, kind="stable")
    samples = int(sample.max()) + 1 if len(sample) else 0
    pointers = np.zeros(samples + 1, np.int64)
    np.cumsum(np.bincount(sample, minlength=samples), out=pointers[1:])
    return {
        "piece_start": starts[order],
        "piece_length": sizes[order].astype(np.int32),
        "sample_pieces": pointers,
    }


def cut_documents(
    lengths: NDArray[Any], offsets: NDArray[Any], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and length of the pieces of every document: as many full ones as it has, then the rest."""
    lengths = np.asarray(lengths, np.int64)
    pieces = -(-lengths // capacity)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(len(first)) - first) * capacity
    starts = np.repeat(np.asarray(offsets, np.int64), pieces) + within
    return starts, np.minimum(capacity, np.repeat(lengths, pieces) - within)


def assign_best_fit(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """(P,) the sample that each piece goes to; `sizes` are between 1 and `capacity`."""
    order = np.argsort(-sizes, kind="stable")
    sample_of = np.empty(len(sizes), np.int64)
    room: dict[int, list[NDArray[np.int64]]] = {}  # free tokens -> samples, in arrays
    occupied = np.zeros(capacity + 1, bool)  # which keys of `room` there are
    samples = 0
    counts = np.bincount(sizes, minlength=capacity + 1)
    taken = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        pieces = order[taken : taken + left]
        taken += left
        while left:
            free, group = _fullest_with_room(room, occupied, size)
            if group is None:
                free = capacity
                group = np.arange(samples, samples - (-left // (capacity // size)), dtype=np.int64)
                samples += len(group)
            each = free // size
            needed = min(len(group), -(-left // each))
            used, unused = group[:needed], group[needed:]
            placed = min(left, needed * each)
            sample_of[pieces[len(pieces) - left : len(pieces) - left + placed]] = np.repeat(used, each)[:placed]
            left -= placed
            partly = placed - (needed - 1) * each  # pieces in the last sample
            _put(room, occupied, free, unused)
            _put(room, occupied, free - each * size, used[:-1])
            _put(room, occupied, free - partly * size, used[-1:])
    return sample_of


def _fullest_with_room(
    room: dict[int, list[NDArray[np.int64]]], occupied: NDArray[np.bool_], size: int
) -> tuple[int, NDArray[np.int64] | None]:
    free = size + int(occupied[size:].argmax())
    if not occupied[free]:
        return 0, None
    occupied[free] = False
    arrays = room.pop(free)
    return free, arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _put(
    room: dict[int, list[NDArray[np.int64]]], occupied: NDArray[np.bool_], free: int, samples: NDArray[np.int64]
) -> None:
    if len(samples) and free:
        room.setdefault(free, []).append(samples)
        occupied[free] = True
