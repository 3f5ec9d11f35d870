"""An answer on its way: how it is sampled, what it has come to, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from arriero.data.tokenizer import Tokenizer
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.request import Request
from arriero.engine.sampling import SamplingRow
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.text_stream import TextStream
from arriero.errors import GenerationError

FinishReason = Literal["stop", "length", "stop_string", "cancelled", "error"]


@dataclass(frozen=True)
class Generation:
    """A whole answer.

    Attributes:
        token_ids: all generated tokens, with the stop token or the stop string's tokens that ended them.
        text: without special tokens, and ending before a stop string.
        finish_reason: "stop" by a stop token or where its structure is complete, "stop_string", "length" after max_new_tokens,
            or "cancelled".
        prompt_tokens: the length of the prompt.
        cached_tokens: how many of them the cache held.
        logprobs: of each token, where they were asked for.
        prompt_logprobs: of each token of the prompt, where they were asked for; None for the first. Of several answers only
            the first has them.
        alternatives: the other answers to the prompt, where several were asked for.
        unchosen_tokens: of the candidates that were generated and are not given (`best_of`); the first answer tells them.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    alternatives: tuple[Generation, ...] = ()
    unchosen_tokens: int = 0


@dataclass(eq=False)
class Answer:
    """A prompt's answer while it grows.

    Attributes:
        request: what the scheduler knows of it.
        sampling: its state for the sampler.
        stop_ids: tokens that end it.
        stream: makes text of the tokens; None where text is wanted only at the end and there are no stop strings.
        token_ids: generated so far.
        logprobs: of each of them, where they are asked for.
        prompt_logprobs: of the prompt's tokens, as far as they are computed; None for the first.
        new_text: what the last step released.
        finish_reason: why it ended; None while it goes on.
        error: what went wrong, with the finish reason "error".
    """

    request: Request
    params: SamplingParams
    prompt_tokens: int
    sampling: SamplingRow[Any]
    stop_ids: frozenset[int]
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    new_text: str = ""
    finish_reason: FinishReason | None = None
    error: str = ""

    def fail(self, error: str) -> None:
        """End it: something went wrong."""
        self.finish_reason, self.error = "error", error

    def take(self, token: int) -> None:
        """Add the next token; what it releases is added to `new_text`."""
        self.token_ids.append(token)
        count = len(self.token_ids)
        may_stop = count >= self.params.min_new_tokens
        grammar = self.sampling.grammar
        finished = grammar is not None and grammar.finished
        if token in self.stop_ids and (may_stop or finished):
            self.finish_reason = "stop"
        else:
            if self.stream is not None:
                self.new_text += self.stream.push(token, may_stop=may_stop)
            if finished:
                self.finish_reason = "stop"
            elif count >= self.params.max_new_tokens:
                self.finish_reason = "length"
            elif grammar is not None and grammar.error:
                self.fail(grammar.error)
        if self.stream is not None:
            if self.finish_reason is not None:
                self.new_text += self.stream.finish(may_stop=may_stop)
            if self.stream.stopped:
                self.finish_reason = "stop_string"

    def result(self, tokenizer: Tokenizer) -> Generation:
        """The finished answer.

        Raises:
            GenerationError: something went wrong with it.
        """
        assert self.finish_reason is not None
        if self.finish_reason == "error":
            raise GenerationError(self.error)
        if self.stream is not None:
            text = self.stream.text
        else:
            stopped = self.finish_reason == "stop" and self.token_ids[-1] in self.stop_ids
            text = tokenizer.decode(self.token_ids[:-1] if stopped else self.token_ids)
        return Generation(
            self.token_ids,
            text,
            self.finish_reason,
            self.prompt_tokens,
            self.request.cached,
            tuple(self.logprobs),
            tuple(self.prompt_logprobs),
        )
