"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Generation
from arriero.engine.grammar import Structure
from arriero.engine.sampling_params import MAX_LOGPROB_VALUES, SamplingParams
from arriero.engine.ticket import Piece
from arriero.errors import ArrieroError
from arriero.serving.api_errors import ApiError, api_error
from arriero.serving.body import read_body
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.call_reader import CallReader, Part
from arriero.serving.openai.fields import structure_of
from arriero.serving.openai.heads import Head
from arriero.serving.openai.messages import NamedTool, for_template
from arriero.serving.openai.requests import ChatRequest
from arriero.serving.openai.token_text import TokenTexts, chat_logprobs
from arriero.serving.openai.tool_format import ToolFormat, format_of, specification, structure_with_tools, taught
from arriero.serving.service import ServedModel, Service

FINISH = {"stop": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True)
class ChatWork:
    """A chat request for the engine.

    Attributes:
        form: how calls are written; None where there are no tools.
    """

    prompt: list[int]
    params: SamplingParams
    form: ToolFormat | None


def chat_prompt(tokenizer: Tokenizer, body: ChatRequest) -> tuple[list[int], ToolFormat | None]:
    """The conversation as token ids, by the model's template, and how it writes calls.

    Raises:
        ApiError: 400: no template, or one that fails.
    """
    if not tokenizer.has_chat_template():
        raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
    messages: list[dict[str, Any]] = [for_template(message) for message in body.messages]
    tools = body.offered
    form = format_of(tokenizer.chat_template)
    if not form.native:
        messages = taught(messages, tools)
    try:
        described = [specification(tool) for tool in tools] if form.native and tools else None
        return tokenizer.chat(messages, tools=described, **body.template_options), form if tools else None
    except ArrieroError as error:
        raise api_error(error) from error


def prepare(service: Service, body: ChatRequest, length: str | None = None, source: str = "messages") -> ChatWork:
    """Template, tokens, parameters: everything before the engine. Not for the event loop.

    Args:
        length, source: the client's own words for the answer's longest length and for the conversation, for errors.

    Raises:
        ApiError: a request that cannot be served.
    """
    prompt, form = chat_prompt(service.tokenizer, body)
    name = length or ("max_tokens" if body.max_tokens is not None else "max_completion_tokens")
    longest = service.room(len(prompt), body.longest, name, source)
    structure: Structure | None
    try:
        if form is not None:
            chosen = body.tool_choice
            tools = body.offered
            if isinstance(chosen, NamedTool):
                tools = [tool for tool in tools if tool.function.name == chosen.function.name]
            structure = structure_with_tools(
                form,
                tools,
                required=isinstance(chosen, NamedTool) or chosen == "required",
                parallel=body.parallel_tool_calls is not False and not isinstance(chosen, NamedTool),
                answer=body.response_format,
            )
        else:
            structure = structure_of(body.response_format)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling(longest, logprobs=logprobs, structure=structure)
    except ArrieroError as error:
        raise ApiError(400, " ".join(str(error).split())) from error
    if body.longest is None:  # then it is the answer that is shortened, as it is by the context
        params = params.shortened(len(prompt))
    values = params.logprob_values(len(prompt))
    if values > MAX_LOGPROB_VALUES:
        wanted = f"'top_logprobs' {body.top_logprobs}" if body.top_logprobs else "'logprobs'"
        count = f" in {body.answers} answers ('n')" if body.answers > 1 else ""
        raise ApiError(
            400,
            f"'{name}' is {longest}: with {wanted} that is up to {values} log-probabilities{count}, and at "
            f"most {MAX_LOGPROB_VALUES} are given in one request",
            param=name,
        )
    return ChatWork(prompt, params, form)


def visible(
    service: Service, tokens: Sequence[int], logprobs: Sequence[Any], ended: bool
) -> tuple[list[int], list[Any]]:
    """Tokens and their log-probabilities without the stop token that ended the answer, which is no part of its text."""
    stops = ended and bool(tokens) and tokens[-1] in service.tokenizer.decoding.special_ids
    last = len(tokens) - 1 if stops else len(tokens)
    return list(tokens[:last]), list(logprobs[:last])


class ChatAnswers:
    """Makes OpenAI's objects of what the engine gives."""

    def __init__(self, service: Service, body: ChatRequest, model: ServedModel, work: ChatWork) -> None:
        self._service, self._body, self._form = service, body, work.form
        self._texts = TokenTexts(service.tokenizer)
        self.head = Head("chatcmpl", model.name)

    def whole(self, job: Job, answers: Sequence[Generation]) -> Response:
        """The answer to a request without `stream`."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return json_response({**self.head.fields("chat.completion"), "choices": choices, "usage": job.usage})

    def _choice(self, index: int, answer: Generation) -> dict[str, Any]:
        content, calls = read_calls(self._form, answer.text, cut=answer.finish_reason != "stop")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self._body.logprobs:
            ended = answer.finish_reason == "stop"
            tokens, found = visible(self._service, answer.token_ids, answer.logprobs, ended)
            logprobs = chat_logprobs(self._texts, tokens, found)
        finish = "tool_calls" if calls and answer.finish_reason == "stop" else FINISH[answer.finish_reason]
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The answer to one with `stream`, piece by piece."""
        readers = [CallReader(self._form) if self._form is not None else None for _ in range(self._body.answers)]
        for index in range(self._body.answers):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for _, piece in job.pieces():
            for chunk in self._of_piece(piece, readers[piece.index]):
                yield chunk
        if self._body.usage_in_stream:
            yield {**self.head.fields("chat.completion.chunk"), "choices": [], "usage": job.usage}

    def _of_piece(self, piece: Piece, reader: CallReader | None) -> list[dict[str, Any]]:
        result = piece.result
        if reader is None:
            parts = [Part(piece.text)] if piece.text else []
        else:
            parts = reader.push(piece.text)
            if result is not None:
                parts += reader.finish(cut=result.finish_reason != "stop")
        deltas = [_delta(part) for part in parts]
        logprobs = None
        if self._body.logprobs and piece.token_ids:
            ended = result is not None and result.finish_reason == "stop"
            tokens, found = visible(self._service, piece.token_ids, piece.logprobs, ended)
            if tokens:
                logprobs = chat_logprobs(self._texts, tokens, found)
                deltas = deltas or [{"content": ""}]
        chunks = []
        for place, delta in enumerate(deltas):
            chunks.append(self._chunk(piece.index, delta, logprobs if place == 0 else None))
        if result is not None:
            called = reader is not None and reader.calls > 0 and result.finish_reason == "stop"
            finish = "tool_calls" if called else FINISH[result.finish_reason]
            chunks.append(self._chunk(piece.index, {}, finish=finish))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self.head.fields("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._body.usage_in_stream else chunk


def _delta(part: Part) -> dict[str, Any]:
    if part.call is None:
        return {"content": part.text}
    call: dict[str, Any] = {"index": part.call, "function": {"arguments": part.text}}
    if part.name is not None:
        call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
    return {"tool_calls": [call]}


def read_calls(form: ToolFormat | None, text: str, *, cut: bool = False) -> tuple[str | None, list[dict[str, Any]]]:
    """An answer's own text, None if it has only calls, and the calls.

    Args:
        cut: whether the answer ended before it was complete; the last call is then as much of it as is known.
    """
    if form is None:
        return text, []
    reader = CallReader(form)
    content = ""
    calls: list[dict[str, Any]] = []
    for part in (*reader.push(text), *reader.finish(cut=cut)):
        if part.call is None:
            content += part.text
        elif part.name is not None:
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        else:
            calls[part.call]["function"]["arguments"] += part.text
    return (content or None) if calls or reader.left_out else content, calls


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatRequest, service.workers)
    model = service.find(body.model)
    work = await service.workers.run(prepare, service, body)
    if service.log_prompts:
        request.state.facts["messages"] = [for_template(message) for message in body.messages]
    job = await service.start(request, model, [work.prompt], work.params)
    answers = ChatAnswers(service, body, model, work)
    if body.stream:
        return EventStream(job, answers.chunks(job))
    return await results(job, request, lambda found: answers.whole(job, found[0]))
