"""/v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Generation
from arriero.engine.sampling_params import MAX_LOGPROB_VALUES, SamplingParams
from arriero.engine.structure import Structure, Thought
from arriero.engine.ticket import Piece
from arriero.errors import ArrieroError, TemplateError
from arriero.serving.api_errors import ApiError, api_error
from arriero.serving.body import read_body
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.answer_reader import AnswerReader, Message
from arriero.serving.openai.call_reader import Calls, Part
from arriero.serving.openai.fields import JsonObjectFormat, JsonSchemaFormat, structure_of
from arriero.serving.openai.heads import Head
from arriero.serving.openai.messages import NamedTool, UserMessage, for_template, text_of
from arriero.serving.openai.requests import ChatRequest, TokenizeRequest
from arriero.serving.openai.thinking import ThoughtTokens, thought_of
from arriero.serving.openai.token_text import TokenTexts
from arriero.serving.openai.told_logprobs import ToldLogprobs
from arriero.serving.openai.tool_format import ToolFormat, format_of, specification, structure_with_tools, taught
from arriero.serving.service import ServedModel, Service

FINISH = {"stop": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True)
class ChatWork:
    """A chat request for the engine.

    Attributes:
        calls: those that the answer may hold; None where there are no tools.
        thought: where the answer thinks before it says anything.
    """

    prompt: list[int]
    params: SamplingParams
    calls: Calls | None
    thought: Thought = "none"


def chat_prompt(tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> tuple[list[int], ToolFormat | None]:
    """The conversation as token ids, by the model's template, and how it writes calls.

    Raises:
        ApiError: 400: no template, or one that fails.
    """
    if not tokenizer.has_chat_template():
        raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
    messages: list[dict[str, Any]] = [for_template(message) for message in body.messages or ()]
    tools = body.offered
    form = format_of(tokenizer.tool_template if tools else tokenizer.chat_template)
    described = [specification(tool) for tool in tools] if form.native and tools else None
    try:
        told = messages if form.native else taught(messages, tools)
        try:
            prompt = tokenizer.chat(told, tools=described, **body.template_options)
        except TemplateError:
            if form.native or not tools:
                raise
            told = taught(messages, tools, in_system=False)  # Mistral's first and Gemma's refuse a system message
            prompt = tokenizer.chat(told, **body.template_options)
        return prompt, form if tools else None
    except ArrieroError as error:
        raise api_error(error) from error


def prepare(service: Service, body: ChatRequest, length: str | None = None, source: str = "messages") -> ChatWork:
    """Template, tokens, parameters: everything before the engine. Not for the event loop.

    Args:
        length, source: the client's own words for the answer's longest length and for the conversation, for errors.

    Raises:
        ApiError: a request that cannot be served.
    """
    said = [text_of(turn.content) for turn in body.messages if isinstance(turn, UserMessage)]
    service.check_length(service.text_bound.tokens_said(said), source)
    prompt, form = chat_prompt(service.tokenizer, body)
    name = length or ("max_tokens" if body.max_tokens is not None else "max_completion_tokens")
    longest = service.room(len(prompt), body.longest, name, source)
    structure: Structure | None
    calls: Calls | None = None
    thought: Thought = "none"
    if service.reasoning and not body.has_own_grammar:
        continued = for_template(body.messages[-1])["content"] if body.continue_final_message else None
        thought = thought_of(service.tokenizer, prompt, continued=continued)
    try:
        if form is not None:
            names = tuple(tool.function.name for tool in body.callable_tools)
            speaks_json = isinstance(body.response_format, JsonObjectFormat | JsonSchemaFormat) and not body.must_call
            calls = Calls(form, names, beside_json=speaks_json)
            structure = structure_with_tools(
                form,
                body.callable_tools,
                required=body.must_call,
                parallel=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool),
                answer=body.response_format,
                thought=thought,
            )
        else:
            structure = structure_of(body.response_format) or body.own_structure()
            if structure is not None:
                structure = replace(structure, thought=thought)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling(longest, logprobs=logprobs, structure=structure)
    except ArrieroError as error:
        raise ApiError(400, " ".join(str(error).split())) from error
    if body.longest is None:  # then it is the answer that is shortened, as it is by the context
        params = params.shortened(len(prompt))
    if form is not None and body.must_call:
        params = replace(params, stop_strings=())  # they are of what is said, and a call alone comes
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
    return ChatWork(prompt, params, calls, thought)


def finish_reason(answer: Generation, arguments: str | None) -> str:
    """In OpenAI's words.

    Args:
        arguments: of the last call; None: there is none. A stop string may have come within the call, or after it.
    """
    called = arguments is not None and (answer.finish_reason == "stop" or _is_whole(arguments))
    return "tool_calls" if called and answer.finish_reason != "length" else FINISH[answer.finish_reason]


def _is_whole(arguments: str) -> bool:
    """Whether it is a JSON object: the beginning of one never is."""
    try:
        return isinstance(json.loads(arguments, parse_int=str), dict)
    except (RecursionError, ValueError):
        return False


@dataclass
class _Growing:
    """An answer that is streamed.

    Attributes:
        arguments: of its last call, as far as they have come.
    """

    reader: AnswerReader
    logprobs: ToldLogprobs
    arguments: list[str] = field(default_factory=list)

    @property
    def last_arguments(self) -> str | None:
        """None: there is no call."""
        return "".join(self.arguments) if self.reader.calls else None

    def take(self, part: Part) -> None:
        """Note what a part says of calls."""
        if part.name is not None:
            self.arguments.clear()
        if part.call is not None:
            self.arguments.append(part.text)


class ChatAnswers:
    """Makes OpenAI's objects of what the engine gives."""

    def __init__(self, service: Service, body: ChatRequest, model: ServedModel, work: ChatWork) -> None:
        self._body, self._work = body, work
        self._texts = TokenTexts(service.tokenizer)
        self.head = Head("chatcmpl", model.name)

    def whole(self, job: Job, answers: Sequence[Generation]) -> Response:
        """The answer to a request without `stream`."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return json_response({**self.head.fields("chat.completion"), "choices": choices, "usage": job.usage})

    def _choice(self, index: int, answer: Generation) -> dict[str, Any]:
        read = Message.read(self._work.calls, answer, self._work.thought)
        message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
        if read.thought and self._tells_thoughts:
            message["reasoning_content"] = read.thought
        if read.calls:
            message["tool_calls"] = read.calls
        logprobs = None
        if self._body.logprobs:
            told = self._told_logprobs()
            told.push(answer.token_ids, answer.logprobs)
            logprobs = told.whole(self._reader().push(answer.text, answer), answer.text)
        finish = finish_reason(answer, read.calls[-1]["function"]["arguments"] if read.calls else None)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The answer to one with `stream`, piece by piece."""
        growing = [_Growing(self._reader(), self._told_logprobs()) for _ in range(self._body.answers)]
        for index in range(self._body.answers):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for _, piece in job.pieces():
            for chunk in self._of_piece(piece, growing[piece.index]):
                yield chunk
        if self._body.usage_in_stream:
            yield {**self.head.fields("chat.completion.chunk"), "choices": [], "usage": job.usage}

    @property
    def _tells_thoughts(self) -> bool:
        return self._body.include_reasoning is not False

    def _reader(self) -> AnswerReader:
        return AnswerReader(self._work.calls, self._work.thought)

    def _told_logprobs(self) -> ToldLogprobs:
        return ToldLogprobs(self._texts, tells_thoughts=self._tells_thoughts)

    def _of_piece(self, piece: Piece, growing: _Growing) -> list[dict[str, Any]]:
        result, told, chunks = piece.result, growing.logprobs, []
        if self._body.logprobs:
            told.push(piece.token_ids, piece.logprobs)
        for part in growing.reader.push(piece.text, result):
            growing.take(part)
            logprobs = told.take(part)
            if self._tells_thoughts or not part.thought:
                chunks.append(self._chunk(piece.index, _delta(part), logprobs))
        if result is not None:
            last = told.end(result.text)
            if last is not None:
                chunks.append(self._chunk(piece.index, {"content": ""}, last))
            finish = finish_reason(result, growing.last_arguments)
            chunks.append(self._chunk(piece.index, {}, finish=finish))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self.head.fields("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._body.usage_in_stream else chunk


def _delta(part: Part) -> dict[str, Any]:
    if part.thought:
        return {"reasoning_content": part.text}
    if part.call is None:
        return {"content": part.text}
    call: dict[str, Any] = {"index": part.call, "function": {"arguments": part.text}}
    if part.name is not None:
        call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
    return {"tool_calls": [call]}


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatRequest, service.workers)
    model = service.find(body.model)
    work = await service.work(request, prepare, service, body)
    if service.log_prompts:
        request.state.facts["messages"] = [for_template(message) for message in body.messages]
    job = await service.start(request, model, [work.prompt], work.params, body.asks_by, body.priority or 0)
    job.thoughts = ThoughtTokens.of(service.tokenizer, work.thought)
    answers = ChatAnswers(service, body, model, work)
    if body.stream:
        return EventStream(job, answers.chunks(job))
    return await results(job, request, lambda found: answers.whole(job, found[0]))
