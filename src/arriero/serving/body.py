"""From the bytes of a request to a checked object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from arriero.serving.api_errors import ApiError
from arriero.serving.strict_json import parse_object
from arriero.serving.workers import Workers

MAX_TOLD = 300  # characters of what a client sent that it is shown again


class Closed(BaseModel):
    """A request or a part of one: no other keys but with null, and no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """A field that is null counts as absent, also one that is not known here: clients send all that they know of."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


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


def disagreement(field: str, message: str) -> PydanticCustomError:
    """What a validator of a whole object raises, with the field that the client should look at."""
    return PydanticCustomError("disagreement", "{reason}", {"field": field, "reason": message})


def refusal(error: ValidationError) -> ApiError:
    """OpenAI's words for it. Of the errors of a union's members the one that got furthest says most; one about a value says
    more than one about its type."""
    errors = error.errors(include_url=False, include_input=False)
    found = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    kind, context = found["type"], found.get("ctx", {})
    location, message = found["loc"], found["msg"]
    if kind == "disagreement":
        location = (*location, context["field"])
    elif location[-1:] == ("[key]",):
        location, message = location[:-2], f"the key {str(location[-2])[:40]!r}: {message}"
    elif kind.endswith("too_short") and context.get("min_length") == 1:
        message = "it is empty"
    named = kind in ("disagreement", "extra_forbidden", "missing")
    where = _path(location[:-1]) + _step(location[-1], len(location) == 1) if named else _path(location)
    where = where[:MAX_TOLD]
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where}", param=where, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    return ApiError(400, f"Invalid '{where}': {message[:MAX_TOLD]}", param=where, code="invalid_value")


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content`; the names that pydantic gives the members of unions are left out."""
    path = ""
    for place, part in enumerate(location):
        member = isinstance(part, str) and (part in _MEMBERS or part[:1].isupper() or "[" in part or "-" in part)
        if place == 0 or not member:
            path += _step(part, place == 0)
    return path


def _step(part: int | str, first: bool) -> str:
    """One part of a path: a field, or a place in a list."""
    if isinstance(part, int):
        return f"[{part}]"
    if not (part.replace("_", "").isalnum() and part.isascii()):
        return repr(part[:40]) if first else f"[{part[:40]!r}]"
    return part if first else f".{part}"


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
