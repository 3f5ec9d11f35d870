"""One route: its address, what answers it, and what the OpenAPI description says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from arriero.serving.service import Service

Handler = Callable[[Request, "Service"], Awaitable[Response]]
_ERRORS = (400, 401, 403, 404, 405, 408, 413, 414, 415, 421, 429, 431, 500, 503, 504)

# One event, whose data is JSON or [DONE].
_STREAMED = {
    "text/event-stream": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}},
}


@dataclass(frozen=True)
class Route:
    """A route.

    Attributes:
        body: what is sent to it, by POST; None: nothing, it is a GET.
        answer: what a good answer is; None: text.
        streams: what an answer is that comes piece by piece, as a media type; "" if it never does.
        statuses: of errors that can have the form of a good answer.
    """

    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    streams: str = ""
    statuses: tuple[int, ...] = ()

    def add_to(self, app: FastAPI, service: Service) -> None:
        """Let an application answer it."""
        handler = self.handler

        async def endpoint(request: Request) -> Response:
            return await handler(request, service)

        responses: dict[int | str, dict[str, Any]] = {
            status: {"description": "An error.", "content": {"application/json": {"schema": _reference("ErrorAnswer")}}}
            for status in _ERRORS
            if status not in self.statuses
        }
        content: dict[str, Any] = {"text/plain": {}}
        if self.answer is not None:
            content = {"application/json": {"schema": _reference(self.answer.__name__)}}
        responses[200] = {"description": "The answer.", "content": content}
        own = self.answer.__name__ if self.answer is not None else "ErrorAnswer"
        for status in self.statuses:
            forms = {"anyOf": [_reference(own), _reference("ErrorAnswer")]}
            responses[status] = {"description": "An error.", "content": {"application/json": {"schema": forms}}}
        if self.streams:
            responses[200]["content"] = {**content, self.streams: {"schema": _STREAMED.get(self.streams, {})}}
        extra: dict[str, Any] = {}
        if self.body is not None:
            schema = {"schema": _reference(self.body.__name__)}
            extra = {"requestBody": {"required": True, "content": {"application/json": schema}}}
        if "{model" in self.path:
            name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            extra["parameters"] = [name]
        app.add_api_route(
            self.path,
            endpoint,
            methods=["GET" if self.body is None else "POST"],
            summary=self.summary,
            name=self.path,
            operation_id=self.path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(":path", ""),
            response_model=None,
            response_class=Response,
            responses=responses,
            openapi_extra=extra,
        )
        if self.body is None:
            app.add_api_route(self.path, endpoint, methods=["HEAD"], include_in_schema=False)


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
