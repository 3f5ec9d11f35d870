"""/v1/completions: plain text, or token ids, goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.answer import Generation
from arriero.engine.sampling_params import MAX_LOGPROB_VALUES, SamplingParams
from arriero.errors import ArrieroError
from arriero.serving.api_errors import ApiError
from arriero.serving.body import read_body
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.chat import FINISH
from arriero.serving.openai.heads import Head
from arriero.serving.openai.requests import CompletionRequest
from arriero.serving.openai.token_text import CompletionLogprobs, TokenTexts
from arriero.serving.service import ServedModel, Service

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


@dataclass(frozen=True)
class PromptText:
    """A prompt as token ids and as the text that `echo` repeats."""

    ids: list[int]
    text: str


def prompts_of(service: Service, body: CompletionRequest) -> list[PromptText]:
    """The prompts of a request, as token ids.

    Raises:
        ApiError: 400: an id that the model does not have.
    """
    prompt = body.prompt
    items: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    tokenizer, size = service.tokenizer, service.background.engine.runner.vocab_size
    found = []
    for item in items:
        if isinstance(item, str):
            service.check_length(service.text_bound.tokens(item))
    for item in items:
        if isinstance(item, str):
            special, parsed = body.add_special_tokens is not False, bool(body.parse_special)
            ids = tokenizer.encode(item, add_special_tokens=special, allow_special=parsed)
            found.append(PromptText(ids, tokenizer.decode(ids) if parsed else item))
            continue
        if max(item) >= size:
            raise ApiError(
                400, f"the prompt holds token id {max(item)}, and the model has ids 0 to {size - 1}", param="prompt"
            )
        found.append(PromptText(list(item), tokenizer.decode(item)))
    if any(not one.ids for one in found):
        raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
    return found


def prepare(service: Service, body: CompletionRequest) -> tuple[list[PromptText], SamplingParams]:
    """Tokens and parameters. Not for the event loop.

    Raises:
        ApiError: a request that cannot be served.
    """
    prompts = prompts_of(service, body)
    # With 0 the prompt alone is wanted; the token that the engine gives all the same is dropped.
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    longest = max(len(prompt.ids) for prompt in prompts)
    room = service.room(longest, None if body.max_tokens is None else wanted)
    of_prompt = body.logprobs if body.echo else None
    try:
        params = body.sampling(
            min(wanted, room),
            logprobs=body.logprobs,
            prompt_logprobs=of_prompt,
            best_of=body.best_of if body.best_of != body.answers else None,
        )
    except ArrieroError as error:
        raise ApiError(400, " ".join(str(error).split())) from error
    if body.max_tokens is None:
        params = params.shortened(longest)
    values = params.logprob_values(longest)
    if values > MAX_LOGPROB_VALUES:
        helps = body.max_tokens is not None and params.shortened(longest) is not params
        raise _too_many_logprobs(body, values, longest, "max_tokens" if helps else "logprobs")
    return prompts, params


def _too_many_logprobs(body: CompletionRequest, values: int, longest: int, param: str) -> ApiError:
    """
    Args:
        values: log-probabilities asked for.
        longest: tokens of a prompt.
        param: the field whose change would help.
    """
    asked = f"'logprobs' is {body.logprobs}"
    if body.max_tokens is not None:
        asked += f" and 'max_tokens' {body.max_tokens}"
    if body.echo:
        asked += f", with 'echo' and a prompt of {longest} tokens"
    if body.best_of is not None or body.answers > 1:
        count = f"'best_of' {body.best_of}" if body.best_of is not None else f"'n' {body.answers}"
        asked += f", with {count}"
    return ApiError(
        400,
        f"{asked}: up to {values} log-probabilities for a prompt, and at most {MAX_LOGPROB_VALUES} are given",
        param=param,
    )


class CompletionAnswers:
    """Makes OpenAI's objects of what the engine gives."""

    def __init__(
        self, service: Service, body: CompletionRequest, model: ServedModel, prompts: Sequence[PromptText]
    ) -> None:
        self._body, self._prompts = body, prompts
        self._texts = TokenTexts(service.tokenizer)
        self._nothing = body.max_tokens == 0
        self.head = Head("cmpl", model.name)

    def whole(self, job: Job, found: Sequence[Sequence[Generation]]) -> Response:
        """The answer to a request without `stream`."""
        choices = []
        for number, answers in enumerate(found):
            of_prompt = answers[0].prompt_logprobs  # only the first has them
            for index, answer in enumerate(answers):
                choices.append(self._choice(number, index, answer, of_prompt))
        return json_response({**self.head.fields("text_completion"), "choices": choices, "usage": job.usage})

    def _choice(self, number: int, index: int, answer: Generation, of_prompt: Sequence[Any]) -> dict[str, Any]:
        text, tokens, logprobs = answer.text, list(answer.token_ids), list(answer.logprobs)
        if self._nothing:
            text, tokens, logprobs = "", [], []
        prompt = self._prompts[number]
        told = None
        if self._body.logprobs is not None:
            writer = CompletionLogprobs(self._texts)
            if self._body.echo:
                writer.echo(prompt.text, prompt.ids, of_prompt)
            told = writer.take(tokens, logprobs, text)
        finish = "length" if self._nothing else FINISH[answer.finish_reason]
        text = prompt.text + text if self._body.echo else text
        return {"index": number * self._body.answers + index, "text": text, "logprobs": told, "finish_reason": finish}

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The answer to one with `stream`, piece by piece."""
        writers: dict[int, CompletionLogprobs] = {}
        of_prompts: dict[int, Sequence[Any]] = {}
        async for number, piece in job.pieces():
            index = number * self._body.answers + piece.index
            text, tokens, logprobs = piece.text, list(piece.token_ids), list(piece.logprobs)
            if self._nothing:
                text, tokens, logprobs = "", [], []
            first = index not in writers
            writer = writers.setdefault(index, CompletionLogprobs(self._texts))
            if first and self._body.echo:
                prompt = self._prompts[number]
                text = prompt.text + text
                of_prompt = of_prompts.setdefault(number, piece.prompt_logprobs or [None] * len(prompt.ids))
                if self._body.logprobs is not None:
                    writer.echo(prompt.text, prompt.ids, of_prompt)
            whole = "" if self._nothing else piece.result.text if piece.result is not None else None
            told = writer.take(tokens, logprobs, whole) if self._body.logprobs is not None else None
            finish = None
            if piece.result is not None:
                finish = "length" if self._nothing else FINISH[piece.result.finish_reason]
            if text or told or finish:
                choice = {"index": index, "text": text, "logprobs": told, "finish_reason": finish}
                yield self._chunk([choice], None)
        if self._body.usage_in_stream:
            yield self._chunk([], job.usage)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> dict[str, Any]:
        chunk = {**self.head.fields("text_completion"), "choices": choices}
        return {**chunk, "usage": usage} if self._body.usage_in_stream else chunk


async def completions(request: Request, service: Service) -> Response:
    """Go on with texts."""
    body = await read_body(request, CompletionRequest, service.workers)
    model = service.find(body.model)
    prompts, params = await service.work(request, prepare, service, body)
    if service.log_prompts:
        request.state.facts["prompts"] = [prompt.text for prompt in prompts]
    ids = [prompt.ids for prompt in prompts]
    job = await service.start(request, model, ids, params, body.form_field, body.priority or 0)
    job.prompt_only = body.max_tokens == 0
    answers = CompletionAnswers(service, body, model, prompts)
    if body.stream:
        return EventStream(job, answers.chunks(job))
    return await results(job, request, lambda found: answers.whole(job, found))
