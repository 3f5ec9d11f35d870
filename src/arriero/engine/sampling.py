"""From logits to the next token: what the user asked for, row by row.

The filters act in the order of transformers' `generate`: repetition penalty, minimum length, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is generated.

    Attributes:
        max_new_tokens: the answer's length at most.
        min_new_tokens: no stop token before this many.
        do_sample: draw at random; else the likeliest token is taken and temperature, top_k, top_p, min_p do nothing.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: only tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: logits of tokens seen in prompt or answer are divided (if positive, else multiplied) by it
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        stop_token_ids: end the answer; None: those of the tokenizer.
        stop_strings: end the answer before them.
        seed: of the draws; the same seed and prompt give the same answer, alone or in any batch.
        ignore_eos: generate on to `max_new_tokens` whatever comes.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, needed: str) -> None:
            if not fine:
                raise GenerationError(f"{name} is {getattr(self, name)!r}: {needed} is needed")

        check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens")
        check("temperature", math.isfinite(self.temperature) and self.temperature > 0, "a positive number")
        check("top_k", self.top_k >= 0, "0 (off) or more")
        check("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "a positive number")
        check("stop_strings", all(self.stop_strings), "no empty string")

    @property
    def plain_greedy(self) -> bool:
        """Whether the likeliest token is taken with nothing changed before."""
        return not self.do_sample and self.repetition_penalty == 1.0 and self.min_new_tokens == 0

    def generator(self) -> torch.Generator:
        """A fresh source of the draws. It lives on the CPU, so that every device draws the same."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def penalise_repetition(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """(V,) logits with those of the tokens seen made smaller."""
    index = torch.tensor(sorted(set(seen)), dtype=torch.long, device=logits.device)
    picked = logits[index]
    return logits.index_copy(0, index, torch.where(picked < 0, picked * penalty, picked / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(V,) logits, -inf but for the k largest (and ties with the k-th)."""
    if k <= 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(V,) logits, -inf but for the smallest set of likeliest tokens of total probability p or more."""
    if p >= 1.0:
        return logits
    ascending, order = logits.sort()
    remove = ascending.softmax(-1).cumsum(-1) <= 1.0 - p
    remove[-1] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter(0, order, remove), -math.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """(V,) logits, -inf where the probability is below `share` of the largest."""
    if share <= 0.0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < share * probabilities.max(), -math.inf)


def filtered_logits(
    logits: Tensor, params: SamplingParams, seen: Sequence[int], new_tokens: int, stop_token_ids: Sequence[int]
) -> Tensor:
    """One row's logits, (V,) fp32, after everything that `params` asks for.

    Args:
        seen: prompt and answer so far.
        new_tokens: length of the answer so far.
    """
    if params.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    if new_tokens < params.min_new_tokens and stop_token_ids:
        logits = logits.index_fill(0, torch.tensor(list(stop_token_ids), device=logits.device), -math.inf)
    if params.do_sample:
        logits = logits / params.temperature
        logits = keep_min_p(keep_top_p(keep_top_k(logits, params.top_k), params.top_p), params.min_p)
    return logits


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """A token drawn from (V,) logits with a single uniform number, by inversion of the cumulative distribution."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    point = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.numel() - 1))
    return token if torch.isfinite(logits[token]) else int(logits.argmax())
