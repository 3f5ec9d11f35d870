"""The answers to one prompt, where it gets several."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Answer, Generation
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError


@dataclass(eq=False)
class AnswerGroup:
    """All that is generated for a prompt. Each answer is a request of its own; they share the prompt's keys and values.

    Attributes:
        params: of the whole.
        answers: `params.candidates` of them, by their index.
    """

    params: SamplingParams
    answers: list[Answer]

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for: all have ended, or one of them failed."""
        reasons = [answer.finish_reason for answer in self.answers]
        return "error" in reasons or None not in reasons

    @property
    def error(self) -> str:
        """What went wrong with one of them, "" otherwise."""
        return next((answer.error for answer in self.answers if answer.finish_reason == "error"), "")

    def results(self, tokenizer: Tokenizer) -> list[Generation]:
        """The n answers: by their index, or the best first where more were generated. The first has the prompt's
        log-probabilities.

        Raises:
            GenerationError: something went wrong with one of them.
        """
        if self.error:
            raise GenerationError(self.error)
        found = [answer.result(tokenizer) for answer in self.answers]
        of_prompt = found[0].prompt_logprobs
        if self.params.selects:
            found = sorted(found, key=_mean_logprob, reverse=True)
            found, others = found[: self.params.n], found[self.params.n :]
            found[0] = replace(found[0], unchosen_tokens=sum(len(one.token_ids) for one in others))
        if self.params.logprobs is None:
            found = [replace(one, logprobs=()) for one in found]
        return [replace(one, prompt_logprobs=() if index else of_prompt) for index, one in enumerate(found)]

    def result(self, tokenizer: Tokenizer) -> Generation:
        """The first of `results`, with the others as its `alternatives`."""
        first, *others = self.results(tokenizer)
        return replace(first, alternatives=tuple(others))


def _mean_logprob(generation: Generation) -> float:
    """Per token; that of an answer without any, which was cancelled, is the least."""
    logprobs = generation.logprobs
    return math.fsum(one.logprob for one in logprobs) / len(logprobs) if logprobs else -math.inf
