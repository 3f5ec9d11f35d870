"""From the bytes of a request to a checked object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from arriero.serving.api_errors import ApiError
from arriero.serving.strict_json import parse_object
from arriero.serving.workers import Workers

MAX_TOLD = 300  # characters of what a client sent that it is shown again


class Closed(BaseModel):
    """A request or a part of one: no other keys, and no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


Body = TypeVar("Body", bound=Closed)


async def read_body(request: Request, kind: type[Body], workers: Workers) -> Body:
    """The body of a request as an object; parsed and checked off the event loop.

    Raises:
        ApiError: 415: not JSON by its own word, which keeps the forms of foreign web pages out; 400: not one of `kind`.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "send JSON, and the header Content-Type: application/json")
    data = await request.body()
    return await workers.run(check, parse_object, data, kind)


def check(parse: Any, data: bytes, kind: type[Body]) -> Body:
    """Parse, then validate.

    Raises:
        ApiError: 400, naming the first thing that is wrong.
    """
    try:
        return kind.model_validate(parse(data))
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> ApiError:
    """OpenAI's words for it. Of the errors of a union's members the one that got furthest says most."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    where = _path(found["loc"])
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where}", param=where, code="unknown_parameter")
    if found["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    message = found["msg"][:MAX_TOLD]
    return ApiError(400, f"Invalid '{where}': {message}", param=where, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`; the names that pydantic gives the members of unions are left out."""
    path = ""
    for place, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif place > 0 and (part in _MEMBERS or part[:1].isupper() or "[" in part or "-" in part):
            continue
        elif part.replace("_", "").isalnum() and part.isascii():
            path += f".{part}" if path else part
        else:
            path += repr(part[:40])
    return path[:MAX_TOLD]


# Tags and types that stand in a location for the member of a union.
_MEMBERS = frozenset(
    {"str", "int", "float", "bool", "dict", "list", "system", "developer", "user", "assistant", "tool", "text"}
)


def components(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """JSON schemas for the OpenAPI description, by name."""
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    defined: dict[str, Any] = schema.get("$defs", {})
    return defined
