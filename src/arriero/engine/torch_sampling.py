"""Choosing tokens with torch: many rows at once, with a value for each row, on any device. See `sampling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from arriero.engine.logprobs import TokenLogprobs, with_likeliest
from arriero.engine.sampling import BROKEN, NUCLEUS_CANDIDATES, Sampler, SamplingRow

Row: TypeAlias = SamplingRow[Tensor]


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide the positive and multiply the negative logits of seen tokens.

    Args:
        logits: (B, V).
        seen: (B, V) bool.
        penalty: (B, 1).
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k greatest logits of each row, and those equal to the smallest of them; k (B,) int64, 1 or more."""
    k = k.clamp(max=logits.shape[-1])
    greatest = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < greatest.gather(1, k[:, None] - 1), -math.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p (B, 1); at least one token."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    ordered = logits.topk(min(NUCLEUS_CANDIDATES, logits.shape[-1]), dim=-1).values
    before = _probability_before(ordered, total)
    if bool((before[:, -1:] < p).any()) and ordered.shape[-1] < logits.shape[-1]:
        ordered = logits.sort(dim=-1, descending=True).values
        before = _probability_before(ordered, total)
    count = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)
    return logits.masked_fill(logits < ordered.gather(1, count - 1), -math.inf)


def _probability_before(ordered: Tensor, total: Tensor) -> Tensor:
    """The summed probability of all tokens before each one; in float64, since the sum has as many terms as tokens."""
    probabilities = (ordered - total).double().exp()
    return probabilities.cumsum(dim=-1) - probabilities


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drop tokens whose probability is below p (B, 1) times the greatest one."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + p.log(), -math.inf)


class TorchSampler(Sampler[Tensor]):
    """A `Sampler` of torch tensors on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """See `Sampler`."""
        self._count(rows, logits.shape[-1])
        # Half precision would make ties of what the processors tell apart.
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        scores = _structured(_before_end(_penalised(_counted(_biased(scores, rows), rows), rows), rows), rows)
        best = scores.max(dim=-1)
        # NaN wins a maximum, so one look at it finds any.
        finite = best.values.isfinite()
        broken = set() if bool(finite.all()) else set((~finite).nonzero().squeeze(1).tolist())
        chosen = best.indices
        drawn = [i for i, row in enumerate(rows) if row.random is not None and i not in broken]
        if drawn:
            picked = _draw(scores[drawn] if len(drawn) < len(rows) else scores, [rows[i] for i in drawn])
            chosen[torch.tensor(drawn, device=chosen.device)] = picked
        tokens: list[int] = chosen.tolist()
        for i, row in enumerate(rows):
            if i in broken:
                tokens[i] = BROKEN
            else:
                row.note(tokens[i])
        return tokens

    def logprobs(self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """See `Sampler`."""
        logprobs = logits.float().log_softmax(dim=-1)
        index = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)[:, None]
        own = logprobs.gather(1, index).squeeze(1).tolist()
        found = logprobs.topk(min(max(counts, default=0), logits.shape[-1]), dim=-1)
        return with_likeliest(own, found.indices.tolist(), found.values.tolist(), counts)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _marks(self, size: int, ids: Collection[int]) -> Tensor:
        marks = torch.zeros(size, dtype=torch.bool, device=self._device)
        marks[self._ids(list(ids))] = True
        return marks

    def _tally(self, size: int, counts: Mapping[int, int]) -> Tensor:
        tally = torch.zeros(size, dtype=torch.float32, device=self._device)
        tally[self._ids(list(counts))] = self._numbers(list(counts.values()))
        return tally


def _on_rows(
    scores: Tensor, rows: Sequence[Row], wanted: Callable[[Row], bool], change: Callable[..., Tensor]
) -> Tensor:
    """Apply a processor to those rows that want it, and copy nothing where none does."""
    chosen = [i for i, row in enumerate(rows) if wanted(row)]
    if not chosen:
        return scores
    states = [rows[i] for i in chosen]
    if len(chosen) == len(rows):
        return change(scores, states)
    index = torch.tensor(chosen, device=scores.device)
    return scores.index_copy(0, index, change(scores[index], states))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """(B, 1) of the logits' type."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _biased(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    biased = [(i, row.bias) for i, row in enumerate(rows) if row.bias is not None]
    if biased:
        scores = scores.clone()
        for i, (ids, values) in biased:
            scores[i, ids] += values.to(scores.dtype)
    return scores


def _counted(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    def change(part: Tensor, states: list[Row]) -> Tensor:
        counts = torch.stack([row.counts for row in states if row.counts is not None])
        frequency = _column([row.params.frequency_penalty for row in states], part)
        presence = _column([row.params.presence_penalty for row in states], part)
        return part - counts * frequency - (counts > 0) * presence

    return _on_rows(scores, rows, lambda row: row.counts is not None, change)


def _penalised(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    def change(part: Tensor, states: list[Row]) -> Tensor:
        seen = torch.stack([row.seen for row in states if row.seen is not None])
        return repetition_penalty(part, seen, _column([row.params.repetition_penalty for row in states], part))

    return _on_rows(scores, rows, lambda row: row.seen is not None, change)


def _before_end(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Forbid the stop tokens of rows that are too young to end."""
    young = [i for i, row in enumerate(rows) if row.may_not_end and len(row.stop_ids)]
    if young:
        scores = scores.clone()
        for i in young:
            scores[i, rows[i].stop_ids] = -math.inf
    return scores


def _structured(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Forbid what the rows' grammars do not let come next.

    After bias and penalties, which cannot bring a forbidden token back, and before top-k, top-p and min-p, which would else
    leave perhaps nothing of what is allowed.
    """

    def change(part: Tensor, states: list[Row]) -> Tensor:
        masks = [row.grammar.allowed for row in states if row.grammar is not None]
        allowed = torch.from_numpy(np.stack(masks)).to(part.device)
        for i, row in enumerate(states):
            assert row.grammar is not None
            allowed[i, row.stop_ids] = row.grammar.accepting
        return part.masked_fill(~allowed, -math.inf)

    return _on_rows(scores, rows, lambda row: row.grammar is not None, change)


def _draw(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """One token a row by inverting the cumulative distribution at one random number of the row's own."""
    # Less the maximum, so that a tiny temperature makes the others -inf and not the greatest one inf.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / _column([row.params.divisor for row in rows], scores)
    scores = _on_rows(
        scores,
        rows,
        lambda row: row.params.top_k > 0,
        lambda part, states: top_k(part, torch.tensor([row.params.top_k for row in states], device=part.device)),
    )
    scores = _on_rows(
        scores,
        rows,
        lambda row: row.params.top_p < 1.0,
        lambda part, states: top_p(part, _column([row.params.top_p for row in states], part)),
    )
    scores = _on_rows(
        scores,
        rows,
        lambda row: row.params.min_p > 0.0,
        lambda part, states: min_p(part, _column([row.params.min_p for row in states], part)),
    )
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    # In vocabulary order, so that rounding differences between batches cannot swap two tokens; float64, so that a token
    # of small probability still moves the sum.
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniform.to(scores.device)[:, None] * cumulative[:, -1:]
    # right=True: the first index whose sum exceeds the target, which has a probability above zero.
    picked = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return picked.clamp(max=scores.shape[-1] - 1)
