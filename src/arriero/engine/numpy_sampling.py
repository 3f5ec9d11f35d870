"""Choosing tokens where there is no torch: one row after the other, in NumPy. See `sampling`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from arriero.engine.logprobs import TokenLogprobs, with_likeliest
from arriero.engine.sampling import BROKEN, NUCLEUS_CANDIDATES, Sampler, SamplingRow

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]


def repetition_penalty(logits: Floats, seen: npt.NDArray[np.bool_], penalty: float) -> Floats:
    """Divide the positive and multiply the negative logits (V,) of seen tokens (V,)."""
    factor = np.float32(penalty)
    return np.where(seen, np.where(logits < 0, logits * factor, logits / factor), logits)


def top_k(logits: Floats, k: int) -> Floats:
    """Keep the k greatest logits (V,), and those equal to the smallest of them; k is 1 or more."""
    place = len(logits) - min(k, len(logits))
    return _from(logits, np.partition(logits, place)[place])


def top_p(logits: Floats, p: float) -> Floats:
    """Keep the smallest set of likeliest tokens (V,) whose probability reaches p; at least one token."""
    possible = logits[logits > -np.inf]  # which may be a few that top-k left
    greatest = possible.max()
    total = greatest + np.log(np.exp(possible - greatest).sum())
    count = min(NUCLEUS_CANDIDATES, len(possible))
    ordered = np.sort(np.partition(possible, len(possible) - count)[len(possible) - count :])[::-1]
    before = _probability_before(ordered, total)
    if before[-1] < p and count < len(possible):
        ordered = np.sort(possible)[::-1]
        before = _probability_before(ordered, total)
    kept = max(1, int((before < np.float32(p)).sum()))
    return _from(logits, ordered[kept - 1])


def _probability_before(ordered: Floats, total: np.float32) -> Doubles:
    """The summed probability of all tokens before each one; in float64, since the sum has as many terms as tokens."""
    probabilities = np.exp((ordered - total).astype(np.float64))
    return np.cumsum(probabilities) - probabilities


def min_p(logits: Floats, p: float) -> Floats:
    """Drop tokens (V,) whose probability is below p times the greatest one."""
    return _from(logits, logits.max() + np.log(np.float32(p)))


def _from(logits: Floats, least: np.float32) -> Floats:
    """Those that are this great; minus infinity in the place of the others."""
    return np.where(logits < least, np.float32(-np.inf), logits)


class NumpySampler(Sampler[npt.NDArray[Any]]):
    """A `Sampler` of NumPy arrays."""

    def __call__(self, logits: npt.NDArray[Any], rows: Sequence[SamplingRow[npt.NDArray[Any]]]) -> list[int]:
        """See `Sampler`."""
        self._count(rows, logits.shape[-1])
        # Half precision would make ties of what the processors tell apart.
        logits = logits.astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            tokens = [_choose(_processed(scores, row), row) for scores, row in zip(logits, rows, strict=True)]
        for token, row in zip(tokens, rows, strict=True):
            if token != BROKEN:
                row.note(token)
        return tokens

    def logprobs(self, logits: npt.NDArray[Any], tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """See `Sampler`."""
        scores = logits.astype(np.float32, copy=False)
        scores = scores - scores.max(axis=1, keepdims=True)
        logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        own = logprobs[np.arange(len(logprobs)), list(tokens)].tolist()
        most = min(max(counts, default=0), logits.shape[1])
        ids = np.argpartition(-logprobs, most - 1, axis=1)[:, :most] if most else np.empty((len(own), 0), np.int64)
        values = np.take_along_axis(logprobs, ids, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids, values = np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)
        return with_likeliest(own, ids.tolist(), values.tolist(), counts)

    def _ids(self, values: Sequence[int]) -> npt.NDArray[Any]:
        return np.array(values, np.int64)

    def _numbers(self, values: Sequence[float]) -> npt.NDArray[Any]:
        return np.array(values, np.float32)

    def _marks(self, size: int, ids: Collection[int]) -> npt.NDArray[Any]:
        marks = np.zeros(size, np.bool_)
        marks[list(ids)] = True
        return marks

    def _tally(self, size: int, counts: Mapping[int, int]) -> npt.NDArray[Any]:
        tally = np.zeros(size, np.float32)
        tally[list(counts)] = list(counts.values())
        return tally


def _processed(scores: Floats, row: SamplingRow[npt.NDArray[Any]]) -> Floats:
    """A row's logits (V,) with bias, penalties, and what may not come next forbidden, in this order: a bias cannot bring back
    what a structure forbids."""
    params, own = row.params, scores
    if row.bias is not None:
        ids, values = row.bias
        scores = scores.copy()
        scores[ids] += values
    if row.counts is not None:
        counts: Floats = row.counts
        scores = scores - counts * np.float32(params.frequency_penalty)
        scores[counts > 0] -= np.float32(params.presence_penalty)
    if row.seen is not None:
        scores = repetition_penalty(scores, row.seen, params.repetition_penalty)
    if row.may_not_end and len(row.stop_ids):
        scores = scores.copy() if scores is own else scores
        scores[row.stop_ids] = -np.inf
    if row.grammar is not None:
        allowed = row.grammar.allowed.copy()
        allowed[row.stop_ids] = row.grammar.accepting
        scores = np.where(allowed, scores, np.float32(-np.inf))
    return scores


def _choose(scores: Floats, row: SamplingRow[npt.NDArray[Any]]) -> int:
    """The likeliest token, or one drawn."""
    best = int(scores.argmax())  # NaN wins a maximum, so one look at it finds any
    if not np.isfinite(scores[best]):
        return BROKEN
    return best if row.random is None else _draw(scores, scores[best], row)


def _draw(scores: Floats, greatest: np.float32, row: SamplingRow[npt.NDArray[Any]]) -> int:
    """A token, by inverting the cumulative distribution at a random number."""
    params = row.params
    # Less the maximum, so that a tiny temperature makes the others -inf and not the greatest one inf.
    scores = (scores - greatest) / np.float32(params.divisor)
    if params.top_k > 0:
        scores = top_k(scores, params.top_k)
    if params.top_p < 1.0:
        scores = top_p(scores, params.top_p)
    if params.min_p > 0.0:
        scores = min_p(scores, params.min_p)
    # float64, so that a token of small probability still moves the sum; the greatest score is 0
    cumulative = np.cumsum(np.exp(scores.astype(np.float64)))
    # right: the first index whose sum exceeds the target, which has a probability above zero
    picked = int(np.searchsorted(cumulative, row.uniform() * cumulative[-1], side="right"))
    return min(picked, len(scores) - 1)
