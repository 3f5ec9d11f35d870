"""How likely tokens were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, by the model itself: natural logarithms of the softmax of the raw logits.

    Attributes:
        logprob: of the token that was chosen.
        top: (id, log-probability) of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of each row's token, and of so many likeliest ones.

    Args:
        logits: (B, V), raw.
        tokens, counts: B each.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    index = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)[:, None]
    own = logprobs.gather(1, index).squeeze(1).tolist()
    most = min(max(counts, default=0), logits.shape[-1])
    found = logprobs.topk(most, dim=-1)
    ids, values = found.indices.tolist(), found.values.tolist()
    return [
        TokenLogprobs(logprob, tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (logprob, count) in enumerate(zip(own, counts, strict=True))
    ]
