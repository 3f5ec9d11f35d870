"""/v1/responses: the younger form of chat, without anything kept between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from arriero.engine.answer import Generation
from arriero.serving.api_errors import ApiError
from arriero.serving.body import read_body, refusal
from arriero.serving.event_stream import EventStream, results
from arriero.serving.job import Job
from arriero.serving.json_response import json_response
from arriero.serving.openai.call_reader import CallReader, Part
from arriero.serving.openai.chat import ChatWork, prepare
from arriero.serving.openai.messages import for_template
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.service import ServedModel, Service

Event = dict[str, Any]


class Items:
    """The items of an answer while they grow: messages, and calls of functions."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open = False

    def take(self, part: Part) -> list[Event]:
        """The events of a part."""
        events: list[Event] = []
        if part.call is None:
            if not self._open or self.output[-1]["type"] != "message":
                events += self.close()
                events += self._begin_message()
            item = self.output[-1]
            item["content"][0]["text"] += part.text
            return [
                *events,
                self._event("response.output_text.delta", item, content_index=0, delta=part.text, logprobs=[]),
            ]
        if part.name is not None:
            events += self.close()
            call = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id, "name": part.name}
            self.output.append({**call, "arguments": "", "status": "in_progress"})
            self._open = True
            return [*events, self._item("response.output_item.added")]
        item = self.output[-1]
        item["arguments"] += part.text
        return [self._event("response.function_call_arguments.delta", item, delta=part.text)]

    def close(self, status: str = "completed") -> list[Event]:
        """The events of the last item's end."""
        if not self._open:
            return []
        self._open = False
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = self._event(
                "response.function_call_arguments.done", item, arguments=item["arguments"], name=item["name"]
            )
            return [done, self._item("response.output_item.done")]
        content = item["content"][0]
        return [
            self._event("response.output_text.done", item, content_index=0, text=content["text"], logprobs=[]),
            self._event("response.content_part.done", item, content_index=0, part=dict(content)),
            self._item("response.output_item.done"),
        ]

    def end(self, status: str) -> list[Event]:
        """The events of the end; an answer without any text is an empty message."""
        events = [] if self.output else self.take(Part(""))
        return events + self.close(status)

    def _begin_message(self) -> list[Event]:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
        self.output.append({**item, "content": []})
        self._open = True
        added = self._item("response.output_item.added")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.output[-1]["content"].append(part)
        return [added, self._event("response.content_part.added", self.output[-1], content_index=0, part=dict(part))]

    def _event(self, kind: str, item: dict[str, Any], **fields: Any) -> Event:
        return {"type": kind, "item_id": item["id"], "output_index": len(self.output) - 1, **fields}

    def _item(self, kind: str) -> Event:
        item = dict(self.output[-1])
        if "content" in item:
            item["content"] = [dict(part) for part in item["content"]]
        return {"type": kind, "output_index": len(self.output) - 1, "item": item}


class ResponseAnswer:
    """Makes the objects of one answer."""

    def __init__(self, body: ResponseRequest, model: ServedModel, work: ChatWork) -> None:
        self._body, self._model, self._form = body, model, work.form
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
                "output_tokens_details": {"reasoning_tokens": 0},
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
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": told,
        }

    def whole(self, job: Job, answer: Generation) -> Response:
        """The answer to a request without `stream`."""
        items = Items()
        reader = self._reader()
        for part in self._parts(reader, answer.text, True):
            items.take(part)
        status = _status(answer)
        items.end(status)
        return json_response(self.object(status, items.output, job.usage))

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """The answer to one with `stream`."""
        number = 0

        def numbered(event: Event) -> Event:
            nonlocal number
            number += 1
            return {**event, "sequence_number": number - 1}

        begun = self.object("in_progress", [], None)
        yield numbered({"type": "response.created", "response": begun})
        yield numbered({"type": "response.in_progress", "response": begun})
        items, reader, status = Items(), self._reader(), "completed"
        async for _, piece in job.pieces():
            for part in self._parts(reader, piece.text, piece.result is not None):
                for event in items.take(part):
                    yield numbered(event)
            if piece.result is not None:
                status = _status(piece.result)
        for event in items.end(status):
            yield numbered(event)
        yield numbered({"type": f"response.{status}", "response": self.object(status, items.output, job.usage)})

    def _reader(self) -> CallReader | None:
        return CallReader(self._form) if self._form is not None else None

    @staticmethod
    def _parts(reader: CallReader | None, text: str, last: bool) -> list[Part]:
        if reader is None:
            return [Part(text)] if text else []
        return reader.push(text) + (reader.finish() if last else [])


def _status(answer: Generation) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


def _failed(error: ApiError) -> Event:
    details = error.body["error"]
    return {
        "type": "error",
        "code": details["code"],
        "message": details["message"],
        "param": details["param"],
        "sequence_number": 0,
    }


async def responses(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ResponseRequest, service.workers)
    model = service.find(body.model)

    def prepared() -> ChatWork:
        try:
            chat = body.as_chat()
        except ValidationError as error:
            raise refusal(error) from None
        return prepare(service, chat)

    work = await service.workers.run(prepared)
    if service.log_prompts:
        request.state.facts["messages"] = [for_template(message) for message in body.as_chat().messages]
    job = await service.start(request, model, [work.prompt], work.params)
    answer = ResponseAnswer(body, model, work)
    if body.stream:
        return EventStream(job, answer.events(job), named=True, done=False, error=_failed)
    return await results(job, request, lambda found: answer.whole(job, found[0][0]))
