"""Several corpora as one: which of them gives each sample, so that at every moment the shares are nearest the weights.

The rule of Megatron-LM's `build_blending_indices`: at step i the corpus with the largest w_d * max(i, 1) - count_d, the
first of equals. It is a recurrence over steps, but what it has given before step i depends (almost always) on i alone and
not on how it began: the attractor of this greedy walk is one tile of the lattice of counts (Adler et al., Convex dynamics
and applications, 2005). So the walk is cut into chunks that are simulated side by side, each from a likely count some steps
before its beginning. A chunk that did not begin where its predecessor ended is simulated again from there: the result is
that of the plain loop, to the last rounding, whatever the guesses were worth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ConfigError

MAX_CORPORA = 1 << 15  # int16
MIN_CHUNK = 256
# counts (corpora times chunks) held at once
MAX_COUNTS = 1 << 22
# the guess is simulated for this many steps before its chunk: about a hundred visits of a corpus of 10 %
WARM_UP = 1024


def samples_per_corpus(samples: int, weight: float) -> int:
    """How many samples a corpus of this normalised weight must be able to give: 0.5 % and 20 more than its share.

    The seed's rule (`get_datasets_weights_and_num_samples` of PaddleNLP).
    """
    return math.ceil(samples * weight * 1.005) + 20


def blend_schedule(weights: NDArray[np.float64], samples: int) -> dict[str, NDArray[Any]]:
    """The corpus of every sample, and which sample of that corpus it is.

    Args:
        weights: (D,) normalised weights.
        samples: number of samples N.

    Returns:
        `dataset_index` (N,) int16 and `dataset_sample_index` (N,) int64.

    Raises:
        ConfigError: for more than 32,768 corpora.
    """
    if len(weights) > MAX_CORPORA:
        raise ConfigError(f"--input_dir names {len(weights):,} corpora: at most {MAX_CORPORA:,} can be blended")
    choice = _choices(np.ascontiguousarray(weights, np.float64), samples)
    given = np.bincount(choice, minlength=len(weights))
    position = np.empty(samples, np.int64)
    position[np.argsort(choice, kind="stable")] = np.arange(samples) - np.repeat(np.cumsum(given) - given, given)
    return {"dataset_index": choice, "dataset_sample_index": position}


def _choices(weights: NDArray[np.float64], samples: int) -> NDArray[np.int16]:
    chunk = max(MIN_CHUNK, math.isqrt(samples), samples * len(weights) // MAX_COUNTS)
    starts = np.arange(0, max(samples, 1), chunk)
    warm_starts = np.maximum(starts - WARM_UP, 0)
    counts = _likely_counts(weights, warm_starts)
    warm = starts >= WARM_UP
    if warm.any():
        _, counts[:, warm] = _walk(weights, warm_starts[warm], counts[:, warm], WARM_UP)
    counts[:, ~warm] = _likely_counts(weights, starts[~warm])
    counts[:, 0] = 0
    choices = np.empty((len(starts), chunk), np.int16)
    ends = np.empty_like(counts)
    redo = np.arange(len(starts))
    while len(redo):
        walked, ends[:, redo] = _walk(weights, starts[redo], counts[:, redo], chunk)
        choices[redo] = walked.T
        redo = 1 + np.flatnonzero((ends[:, :-1] != counts[:, 1:]).any(axis=0))
        counts[:, redo] = ends[:, redo - 1]
    return choices.reshape(-1)[:samples]


def _likely_counts(weights: NDArray[np.float64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """(D, B) counts that sum to `steps` and are nearest the shares: rounded down, then one more to the largest rests."""
    shares = weights[:, None] * steps
    counts: NDArray[np.float64] = np.floor(shares)
    missing = steps - counts.sum(axis=0)
    order = np.argsort(counts - shares, axis=0, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(weights))[:, None], axis=0)
    counts += rank < missing
    return counts


def _walk(
    weights: NDArray[np.float64], starts: NDArray[np.int64], counts: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Simulate B chunks side by side: choices (steps, B), and the counts (D, B) after them. Counts are exact in float64."""
    counts = np.ascontiguousarray(counts)
    flat = counts.reshape(-1)
    chunks = np.arange(len(starts))
    choices = np.empty((steps, len(starts)), np.int16)
    error = np.empty_like(counts)
    for step in range(steps):
        np.multiply(weights[:, None], np.maximum(starts + step, 1).astype(np.float64), out=error)
        error -= counts
        best = error.argmax(axis=0)  # the first of equals
        choices[step] = best
        flat[best * len(starts) + chunks] += 1
    return choices, counts
