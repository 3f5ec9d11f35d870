"""/v1/responses: the younger form of chat, without anything kept between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.answer import Generation
from arriero.engine.logprobs import TokenLogprobs
from arriero.serving.api_errors import ApiError
from arriero.serving.body import read_body
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.answer_reader import AnswerReader
from arriero.serving.openai.chat import ChatWork, prepare
from arriero.serving.openai.messages import for_template
from arriero.serving.openai.response_items import Event, Items
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.openai.thinking import ThoughtTokens
from arriero.serving.openai.token_text import MessageLogprobs, TokenTexts
from arriero.serving.service import ServedModel, Service


class ResponseAnswer:
    """Makes the objects of one answer."""

    def __init__(self, service: Service, body: ResponseRequest, model: ServedModel, work: ChatWork) -> None:
        self._body, self._model, self._work = body, model, work
        self._texts, self._events = TokenTexts(service.tokenizer), 0
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())

    def object(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """The response itself."""
        body = self._body.model_dump(mode="json", by_alias=True, exclude_none=True)
        told = None
        if usage is not None:
            told = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
                "total_tokens": usage["total_tokens"],
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self._model.name,
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}, **(body.get("text") or {})},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_logprobs": body.get("top_logprobs", 0),
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": told,
        }

    def whole(self, job: Job, answer: Generation) -> Response:
        """The answer to a request without `stream`."""
        items = Items(self._logprobs(answer.token_ids, answer.logprobs))
        reader = self._reader()
        for part in reader.push(answer.text, answer):
            items.take(part)
        status = _status(answer)
        items.end(status, nothing=reader.speechless)
        return json_response(self.object(status, items.output, job.usage))

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """The answer to one with `stream`."""
        numbered = self._numbered
        begun = self.object("in_progress", [], None)
        yield numbered({"type": "response.created", "response": begun})
        yield numbered({"type": "response.in_progress", "response": begun})
        reader, status, logprobs = self._reader(), "completed", self._logprobs()
        items = Items(logprobs)
        async for _, piece in job.pieces():
            if logprobs is not None:
                logprobs.push(piece.token_ids, piece.logprobs)
            for part in reader.push(piece.text, piece.result):
                for event in items.take(part):
                    yield numbered(event)
            if piece.result is not None:
                status = _status(piece.result)
        for event in items.end(status, nothing=reader.speechless):
            yield numbered(event)
        yield numbered({"type": f"response.{status}", "response": self.object(status, items.output, job.usage)})

    def _reader(self) -> AnswerReader:
        return AnswerReader(self._work.calls, self._work.thought)

    def _logprobs(self, tokens: Sequence[int] = (), logprobs: Sequence[TokenLogprobs] = ()) -> MessageLogprobs | None:
        if not self._body.tells_logprobs:
            return None
        found = MessageLogprobs(self._texts)
        found.push(tokens, logprobs)
        return found

    def _numbered(self, event: Event) -> Event:
        self._events += 1
        return {**event, "sequence_number": self._events - 1}

    def failed(self, error: ApiError) -> Event:
        """The event of an error on the way."""
        details = error.body["error"]
        told = {name: details[name] for name in ("code", "message", "param")}
        return self._numbered({"type": "error", **told})


def _status(answer: Generation) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


async def responses(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ResponseRequest, service.workers)
    model = service.find(body.model)

    def prepared() -> ChatWork:
        return prepare(service, body.as_chat(), "max_output_tokens", "input")

    work = await service.work(request, prepared)
    if service.log_prompts:
        request.state.facts["messages"] = [for_template(message) for message in body.as_chat().messages]
    form = "tools" if work.calls is not None else "text.format"
    job = await service.start(request, model, [work.prompt], work.params, form)
    job.thoughts = ThoughtTokens.of(service.tokenizer, work.thought)
    answer = ResponseAnswer(service, body, model, work)
    if body.stream:
        return EventStream(job, answer.events(job), named=True, done=False, error=answer.failed)
    return await results(job, request, lambda found: answer.whole(job, found[0][0]))
