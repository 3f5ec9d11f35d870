"""The seed's /api/chat: one JSON object, or one JSON line for each piece of the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.answer import Generation
from arriero.engine.sampling_params import MAX_INTEGER, SamplingParams
from arriero.engine.structure import Thought
from arriero.engine.ticket import Piece
from arriero.errors import ArrieroError
from arriero.serving.api_errors import ApiError
from arriero.serving.body import Closed, disagreement, read_body
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.answer_reader import AnswerReader, Message
from arriero.serving.openai.fields import ModelName, Text
from arriero.serving.openai.thinking import thought_of
from arriero.serving.service import Service
from arriero.serving.strict_json import parse_value

MAX_TURNS = 4096
DEFAULT_MAX_LENGTH = 1024
SERVER_ERROR, TOO_LONG = 1000, 1  # error_code

Number = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class SeedTurn(Closed):
    """A turn of the conversation; the client says user or bot, or leaves it to the order."""

    role: Literal["user", "bot", "assistant", "system"]
    utterance: Text


class SeedChatRequest(Closed):
    """Body of /api/chat. `extra_info` is taken and has no effect, as in the seed."""

    context: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    history: Text | Annotated[list[Text | SeedTurn], Field(max_length=MAX_TURNS, fail_fast=True)] | None = None
    stream: bool | None = None
    model: ModelName | None = None
    max_length: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    min_length: Number | None = None
    src_length: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    top_k: Number | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    extra_info: Any = None

    @model_validator(mode="after")
    def _agree(self) -> SeedChatRequest:
        if len(self.earlier()) % 2 and not self._told():
            raise disagreement("history", "history must hold pairs: what was asked, what was answered")
        return self

    @property
    def streams(self) -> bool:
        """Whether the answer comes in lines: as the seed's later server, where `history` or `stream` is given."""
        return self.history is not None if self.stream is None else self.stream

    def earlier(self) -> list[Any]:
        """The turns before the last one; `history` may be JSON text."""
        history: Any = self.history
        if isinstance(history, str):
            history = [] if not history.strip() else parse_value(history)
            if not isinstance(history, list) or len(history) > MAX_TURNS:
                raise disagreement("history", "history is text that is no JSON list")
        return [*(history or ()), *(self.context[:-1] if isinstance(self.context, list) else ())]

    def _told(self) -> bool:
        return any(not isinstance(turn, str) for turn in self.earlier())

    def messages(self) -> list[dict[str, str]]:
        """The conversation for a chat template.

        Raises:
            ApiError: 400: a turn of another form, in a history that was JSON text.
        """
        messages = []
        for index, turn in enumerate(self.earlier()):
            role: str
            text: Any
            if isinstance(turn, str):
                role, text = ("assistant" if index % 2 else "user"), turn
            else:
                fields = turn if isinstance(turn, dict) else turn.model_dump() if isinstance(turn, SeedTurn) else {}
                role, text = str(fields.get("role", "")), fields.get("utterance")
                if role not in ("user", "bot", "assistant", "system") or not isinstance(text, str):
                    raise ApiError(
                        400, f"history[{index}] is no turn: give text, or role and utterance", param="history"
                    )
                role = "assistant" if role == "bot" else role
            messages.append({"role": role, "content": text})
        last = self.context[-1] if isinstance(self.context, list) else self.context
        return [*messages, {"role": "user", "content": last}]


@dataclass(frozen=True)
class SeedWork:
    """A request for the engine."""

    prompt: list[int]
    params: SamplingParams
    thought: Thought


class SeedError(ApiError):
    """An error in the seed's form.

    Attributes:
        number: the seed's `error_code`.
    """

    def __init__(self, error: ApiError, number: int = SERVER_ERROR) -> None:
        super().__init__(error.status, error.message, param=error.param, code=error.code, retry_after=error.retry_after)
        self.number = number

    @property
    def body(self) -> dict[str, Any]:
        """The seed's form."""
        return seed_error(self, self.number)


def seed_error(error: ApiError, number: int = SERVER_ERROR) -> dict[str, Any]:
    """An error in the seed's form."""
    message = f"Server error: {error.message}" if number == SERVER_ERROR else error.message
    return {"error_code": number, "error_msg": message, "result": None}


def seed_answer(text: str) -> dict[str, Any]:
    """An answer, or a piece of one, in the seed's form."""
    return {"error_code": 0, "error_msg": "Success", "result": {"response": {"role": "bot", "utterance": text}}}


def prepare(service: Service, body: SeedChatRequest) -> SeedWork:
    """Template, tokens, parameters. Not for the event loop.

    Raises:
        ApiError: a request that cannot be served.
    """
    context, tokenizer = service.limits.context, service.tokenizer
    if body.src_length is not None and body.src_length + (body.max_length or 1) > context:
        message = (
            f"The sum of src_length<{body.src_length}> and max_length<{body.max_length}> should be smaller than or equal to "
            f"the max-total-length<{context}>"
        )
        raise SeedError(ApiError(400, message), TOO_LONG)
    messages = body.messages()
    try:
        said = [turn["content"] for turn in messages if turn["role"] == "user"]
        service.check_length(service.text_bound.tokens_said(said), "context")
    except ApiError as error:
        raise SeedError(error, TOO_LONG) from error
    try:
        if tokenizer.has_chat_template():
            prompt = tokenizer.chat(messages)
        else:
            prompt = tokenizer.encode("\n".join(turn["content"] for turn in messages), add_special_tokens=True)
    except ArrieroError as error:
        raise ApiError(400, "the conversation does not fit the model's chat template") from error
    if body.src_length is not None and len(prompt) > body.src_length:
        too_long = f"the prompt has {len(prompt)} tokens and src_length is {body.src_length}: shorten it"
        raise SeedError(ApiError(400, too_long), TOO_LONG)
    try:
        room = service.room(len(prompt), body.max_length, "max_length", "context")
    except ApiError as error:
        raise SeedError(error, TOO_LONG) from error
    longest = room if body.max_length is not None else min(room, DEFAULT_MAX_LENGTH)
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    try:
        params = SamplingParams(
            max_new_tokens=longest,
            min_new_tokens=min(body.min_length or 0, longest),
            do_sample=temperature > 0 and top_p > 0,
            temperature=temperature,
            top_p=top_p or 1.0,
            top_k=body.top_k or 0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        )
    except ArrieroError as error:
        raise ApiError(400, str(error)) from error
    return SeedWork(prompt, params, thought_of(tokenizer, prompt) if service.reasoning else "none")


async def seed_chat(request: Request, service: Service) -> Response:
    """Answer as the seed's server does."""
    try:
        body = await read_body(request, SeedChatRequest, service.workers)
        model = service.find(body.model)
        work = await service.work(request, prepare, service, body)
        if service.log_prompts:
            request.state.facts["messages"] = body.messages()
        job = await service.start(request, model, [work.prompt], work.params)
        if body.streams:
            return EventStream(job, _lines(job, work.thought), lines=True, error=seed_error)

        def whole(found: list[list[Generation]]) -> Response:
            said = Message.read(None, found[0][0], work.thought).content
            return json_response(seed_answer(said or "invalid response"))

        return await results(job, request, whole)
    except SeedError:
        raise
    except ApiError as error:
        raise SeedError(error) from error


async def _lines(job: Job, thought: Thought) -> AsyncIterator[dict[str, Any]]:
    piece: Piece
    reader = AnswerReader(None, thought)
    async for _, piece in job.pieces():
        for part in reader.push(piece.text, piece.result):
            if not part.thought:
                yield seed_answer(part.text)
