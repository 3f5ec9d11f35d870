"""How likely tokens were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, by the model itself: natural logarithms of the softmax of the raw logits.

    Attributes:
        logprob: of the token that was chosen.
        top: (id, log-probability) of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def with_likeliest(
    own: Sequence[float], ids: Sequence[Sequence[int]], values: Sequence[Sequence[float]], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Each token's log-probability, and those of as many of the likeliest ones as are wanted of each.

    Args:
        own, counts: B each.
        ids, values: (B, at least the most of the counts), the likeliest first.
    """
    return [
        TokenLogprobs(logprob, tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (logprob, count) in enumerate(zip(own, counts, strict=True))
    ]
