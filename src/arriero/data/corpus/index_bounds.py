"""Whether the arrays of an index fit their corpus: each number within its bounds.

A cache lies in a folder where others may write; what is out of bounds there would end a run far from its cause. Every
function here looks at all numbers once, in chunks, and raises `ValueError` where one does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.data.corpus.index_cache import Arrays

CHUNK = 1 << 20


def check_stream(arrays: Arrays, documents: range, lengths: NDArray[Any], epochs: int, samples: int) -> None:
    """The arrays of `sample_index.build_sample_indexes`.

    Args:
        documents: those of the part.
        lengths: tokens of every document of the corpus.
    """
    order, index = arrays["doc_idx"], arrays["sample_idx"]
    _require(order.shape == (epochs * len(documents),), "doc_idx")
    _require(index.shape == (samples + 1, 2), "sample_idx")
    _check_range(order, documents.start, documents.stop, "doc_idx")
    _check_range(index[:, 0], 0, len(order), "sample_idx")
    for start in range(0, samples + 1, CHUNK):
        place, token = index[start : start + CHUNK + 1].T.astype(np.int64)
        # the first sample begins at 0 even if the first document is empty
        _require((token >= 0) & ((token < lengths[order[place]]) | (token == 0)), "sample_idx")
        later = (place[1:] > place[:-1]) | ((place[1:] == place[:-1]) & (token[1:] > token[:-1]))
        _require(later, "sample_idx")
    check_order(arrays, samples, samples)


def check_order(arrays: Arrays, of: int, samples: int) -> None:
    """An order in which samples are visited, `shuffle_idx`: `samples` numbers below `of`."""
    _require(arrays["shuffle_idx"].shape == (samples,), "shuffle_idx")
    _check_range(arrays["shuffle_idx"], 0, of, "shuffle_idx")


def check_packs(arrays: Arrays, tokens: int, capacity: int) -> None:
    """The arrays of `best_fit.pack_best_fit`.

    Args:
        tokens: of the corpus.
        capacity: tokens that a sample has room for.
    """
    starts, lengths, pointers = arrays["piece_start"], arrays["piece_length"], arrays["sample_pieces"]
    _require(starts.ndim == lengths.ndim == pointers.ndim == 1, "shape")
    _require(len(starts) == len(lengths) and len(pointers) > 1, "shape")
    _require(pointers[0] == 0 and pointers[-1] == len(starts), "sample_pieces")
    _check_range(lengths, 1, capacity + 1, "piece_length")
    _check_range(starts, 0, tokens, "piece_start")
    for chunk in _chunks(len(starts)):
        _require(starts[chunk].astype(np.int64) + lengths[chunk] <= tokens, "piece_start")
    for start in range(0, len(pointers), CHUNK):
        _require(np.diff(pointers[start : start + CHUNK + 1].astype(np.int64)) > 0, "sample_pieces")


def check_blend(arrays: Arrays, corpora: int, samples: int) -> None:
    """The arrays of `blend.blend_schedule`: each corpus gives its samples from the first one on."""
    choice, position = arrays["dataset_index"], arrays["dataset_sample_index"]
    _require(choice.shape == position.shape == (samples,), "shape")
    _check_range(choice, 0, corpora, "dataset_index")
    given = np.bincount(choice, minlength=corpora)
    for chunk in _chunks(samples):
        _require((position[chunk] >= 0) & (position[chunk] < given[choice[chunk]]), "dataset_sample_index")


def _check_range(array: NDArray[Any], low: int, high: int, name: str) -> None:
    """Every number is at least `low` and below `high`."""
    for chunk in _chunks(len(array)):
        _require(int(array[chunk].min()) >= low and int(array[chunk].max()) < high, name)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _require(fits: bool | np.bool_ | NDArray[np.bool_], name: str) -> None:
    if not np.all(fits):
        raise ValueError(f"its {name} does not fit the corpus")
