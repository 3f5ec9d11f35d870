"""How likely a prompt's own tokens are, taken from the logits of the steps that compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arriero.engine.answer import Answer
from arriero.engine.request import Request
from arriero.engine.sampling import Sampler
from arriero.engine.scheduler import Share

if TYPE_CHECKING:
    from arriero.engine.work import Logits

# Of one step, over all requests: 128 MiB in single precision, and as much again while their softmax is taken.
MAX_STEP_LOGITS = 2**25


def max_step_scores(vocab_size: int) -> int:
    """Of how many tokens of prompts a step may give logits."""
    return max(1, MAX_STEP_LOGITS // vocab_size)


def drawn_rows(share: Share) -> int:
    """Of how many of a share's last tokens logits are wanted to draw what follows them."""
    return share.start + share.count - len(share.request.tokens) + 1 if share.samples else 0


def wanted_rows(share: Share) -> int:
    """Of how many of a share's last tokens logits are wanted, to draw or to score the prompt."""
    request = share.request
    if request.scored is None:
        return drawn_rows(share)
    return max(drawn_rows(share), share.start + share.count - max(share.start, request.scored))


def score_prompts(
    logits: Logits, shares: Sequence[Share], answers: Mapping[Request, Answer], sampler: Sampler[Any]
) -> Logits:
    """Note how likely the prompts' tokens are, and leave the logits to draw from.

    Args:
        logits: (sum of `wanted_rows`, V).

    Returns:
        (sum of `drawn_rows`, V).
    """
    if all(share.request.scored is None for share in shares):
        return logits
    left: list[int] = []
    end = 0
    for share in shares:
        request, drawn, wanted = share.request, drawn_rows(share), wanted_rows(share)
        start, end = end, end + wanted
        left += range(end - drawn, end)
        if request.scored is None:
            continue
        answer, count, first = answers[request], wanted - drawn, max(share.start, request.scored)
        following = request.tokens[first + 1 : first + 1 + count]
        alternatives = [answer.params.prompt_logprobs or 0] * count
        answer.prompt_logprobs += sampler.logprobs(logits[start : start + count], following, alternatives)
        scored = first + count
        request.scored = scored if scored < request.prompt_length - 1 else None
    return logits[left]
