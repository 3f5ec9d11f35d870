"""How the next token is chosen from the logits.

The processors are those of transformers' `generate`, in its order: repetition penalty, no early end, temperature,
top-k, top-p, min-p. Before them come those of the OpenAI API: bias, then frequency and presence penalty. Each works on many
rows at once with a value for each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arriero.engine.grammar import GrammarState
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError

# Top-p needs sorted logits. A nucleus is nearly always within this many, which cost much less than a full sort.
NUCLEUS_CANDIDATES = 1024
BROKEN = -1  # in the place of a token


@dataclass
class SamplingRow:
    """One answer's state between its tokens.

    Attributes:
        stop_ids: tokens that may not come before `min_new_tokens`.
        generated: how many tokens have been drawn.
        seen: (V,) bool, the tokens that the repetition penalty counts; None when it is off.
        counts: (V,) fp32, how often the answer has each token; None where no penalty counts them.
        bias: ids (N,) and what is added to their logits (N,); None without.
        generator: the row's own random numbers, so that its draws do not depend on the other rows; None when greedy.
        grammar: which tokens the answer's structure lets come next; None without one.
    """

    params: SamplingParams
    stop_ids: Tensor
    generated: int = 0
    seen: Tensor | None = field(default=None, repr=False)
    counts: Tensor | None = field(default=None, repr=False)
    bias: tuple[Tensor, Tensor] | None = None
    generator: torch.Generator | None = None
    grammar: GrammarState | None = None

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        prompt: Iterable[int],
        stop_ids: Iterable[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
        grammar: GrammarState | None = None,
    ) -> SamplingRow:
        """The state before the first token.

        Raises:
            GenerationError: a bias for a token that the model does not have; a grammar of the empty text, and no stop token.
        """
        stops = torch.tensor(sorted(i for i in set(stop_ids) if i < vocab_size), dtype=torch.long, device=device)
        if grammar is not None and grammar.finished and len(stops) == 0:
            raise GenerationError(
                "the answer's structure allows only the empty text, and there is no stop token to say so"
            )
        row = cls(params, stops, grammar=grammar)
        if params.repetition_penalty != 1.0:
            row.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            row.seen[torch.tensor(sorted(set(prompt)), dtype=torch.long, device=device)] = True
        if params.frequency_penalty or params.presence_penalty:
            row.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        if params.logit_bias:
            strange = [token for token in params.logit_bias if token >= vocab_size]
            if strange:
                raise GenerationError(
                    f"logit_bias names token id {strange[0]} and the model has ids 0 to {vocab_size - 1}"
                )
            row.bias = (
                torch.tensor(list(params.logit_bias), dtype=torch.long, device=device),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device),
            )
        if not params.greedy:
            row.generator = torch.Generator()
            if params.seed is None:
                row.generator.seed()
            else:
                row.generator.manual_seed(params.seed)
        return row


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


class Sampler:
    """Chooses each row's next token; a row's choice depends on that row alone."""

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Next ids (B,) int64 on the logits' device; the rows' states move on.

        A row whose logits are no finite numbers gets `BROKEN`, and the others what they get without it.

        Args:
            logits: (B, V).
            rows: B states.
        """
        # Half precision would make ties of what the processors tell apart.
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        scores = _structured(_before_end(_penalised(_counted(_biased(scores, rows), rows), rows), rows), rows)
        best = scores.max(dim=-1)
        # NaN wins a maximum, so one look at it finds any.
        finite = best.values.isfinite()
        broken = set() if bool(finite.all()) else set((~finite).nonzero().squeeze(1).tolist())
        chosen = best.indices
        drawn = [i for i, row in enumerate(rows) if row.generator is not None and i not in broken]
        if drawn:
            picked = _draw(scores[drawn] if len(drawn) < len(rows) else scores, [rows[i] for i in drawn])
            chosen[torch.tensor(drawn, device=chosen.device)] = picked
        for i, row in enumerate(rows):
            if i in broken:
                chosen[i] = BROKEN
                continue
            row.generated += 1
            if row.seen is not None:
                row.seen[chosen[i]] = True
            if row.counts is not None:
                row.counts[chosen[i]] += 1
            if row.grammar is not None:
                row.grammar.advance(int(chosen[i]))
        return chosen


def _on_rows(
    scores: Tensor, rows: Sequence[SamplingRow], wanted: Callable[[SamplingRow], bool], change: Callable[..., Tensor]
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


def _biased(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    biased = [(i, row.bias) for i, row in enumerate(rows) if row.bias is not None]
    if biased:
        scores = scores.clone()
        for i, (ids, values) in biased:
            scores[i, ids] += values.to(scores.dtype)
    return scores


def _counted(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    def change(part: Tensor, states: list[SamplingRow]) -> Tensor:
        counts = torch.stack([row.counts for row in states if row.counts is not None])
        frequency = _column([row.params.frequency_penalty for row in states], part)
        presence = _column([row.params.presence_penalty for row in states], part)
        return part - counts * frequency - (counts > 0) * presence

    return _on_rows(scores, rows, lambda row: row.counts is not None, change)


def _penalised(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    def change(part: Tensor, states: list[SamplingRow]) -> Tensor:
        seen = torch.stack([row.seen for row in states if row.seen is not None])
        return repetition_penalty(part, seen, _column([row.params.repetition_penalty for row in states], part))

    return _on_rows(scores, rows, lambda row: row.seen is not None, change)


def _before_end(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Forbid the stop tokens of rows that are too young to end."""
    young = [
        i
        for i, row in enumerate(rows)
        if row.generated < row.params.min_new_tokens
        and len(row.stop_ids)
        and not (row.grammar is not None and row.grammar.finished)  # nothing else can come
    ]
    if young:
        scores = scores.clone()
        for i in young:
            scores[i, rows[i].stop_ids] = -math.inf
    return scores


def _structured(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Forbid what the rows' grammars do not let come next.

    After bias and penalties, which cannot bring a forbidden token back, and before top-k, top-p and min-p, which would else
    leave perhaps nothing of what is allowed.
    """

    def change(part: Tensor, states: list[SamplingRow]) -> Tensor:
        masks = [row.grammar.allowed for row in states if row.grammar is not None]
        allowed = torch.stack(masks).to(part.device)
        for i, row in enumerate(states):
            assert row.grammar is not None
            allowed[i, row.stop_ids] = row.grammar.accepting
        return part.masked_fill(~allowed, -math.inf)

    return _on_rows(scores, rows, lambda row: row.grammar is not None, change)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token a row by inverting the cumulative distribution at one random number of the row's own."""
    # Less the maximum, so that a tiny temperature makes the others -inf and not the greatest one inf.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / _column([row.params.temperature for row in rows], scores)
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
    uniform = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows])
    # In vocabulary order, so that rounding differences between batches cannot swap two tokens; float64, so that a token
    # of small probability still moves the sum.
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniform.to(scores.device)[:, None] * cumulative[:, -1:]
    # right=True: the first index whose sum exceeds the target, which has a probability above zero.
    picked = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return picked.clamp(max=scores.shape[-1] - 1)
