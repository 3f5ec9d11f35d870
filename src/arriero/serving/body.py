"""From the bytes of a request to a checked object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
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
        if not isinstance(given, dict):
            return given
        told = {name: value for name, value in given.items() if value is not None}
        if len(told) > len(cls.model_fields) and cls.model_config.get("extra") == "forbid":
            # The first unknown one is enough to refuse it: an error for each of a hundred thousand would take half a second.
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in [name for name in told if name not in known][1:]:
                del told[name]
        return told


Body = TypeVar("Body", bound=Closed)


async def read_body(request: Request, kind: type[Body], workers: Workers) -> Body:
    """The body of a request as an object; parsed and checked off the event loop.

    Raises:
        ApiError: 415: not JSON by its own word, which keeps the forms of foreign web pages out, or JSON that is packed or in
            another character set; 400: not one of `kind`.
    """
    media, *parameters = (part.strip().lower() for part in request.headers.get("content-type", "").split(";"))
    if media != "application/json":
        raise ApiError(415, "send JSON, and the header Content-Type: application/json")
    charset = next((part[8:].strip("\"'") for part in parameters if part.startswith("charset=")), "utf-8")
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, f"the character set {charset[:40]!r} is not read here: send UTF-8")
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("identity", ""):
        raise ApiError(415, f"Content-Encoding: {packed[:40]} is not read here: send the body as it is")
    data = await request.body()
    request.state.body_bytes = len(data)
    return await workers.run(check, parse_object, data, kind)


def check(parse: Any, data: bytes, kind: type[Body]) -> Body:
    """Parse, then validate.

    Raises:
        ApiError: 400, naming the first thing that is wrong.
    """
    return validated(parse(data), kind)


def validated(given: Any, kind: type[Body]) -> Body:
    """An object of what JSON gives.

    Raises:
        ApiError: 400, naming the first thing that is wrong.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None


def only(value: Any, reason: str) -> BeforeValidator:
    """For a field that has this one value here; None: none at all. Others are told the reason, and not the type."""

    def checked(given: Any) -> Any:
        if given == value and isinstance(given, bool) == isinstance(value, bool):
            return value
        raise PydanticCustomError("unsupported", "{reason}", {"reason": reason})

    return BeforeValidator(checked)


def at_most(count: int) -> BeforeValidator:
    """For an object of any names: it has no more of them. A bound of pydantic's own is looked at after its members, each of
    which could be an error. (A list stops at its first wrong item with `fail_fast`.)"""

    def checked(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > count:
            told = {"given": len(given), "count": count}
            raise PydanticCustomError("too_long", "it has {given} entries: at most {count} are taken", told)
        return given

    return BeforeValidator(checked)


def disagreement(field: str, message: str, *inside: int | str) -> PydanticCustomError:
    """What a validator of a whole object raises, with the field that the client should look at, and the place inside it."""
    return PydanticCustomError("disagreement", "{reason}", {"field": field, "inside": inside, "reason": message})


def _refusal(error: ValidationError, given: Any) -> ApiError:
    """OpenAI's words for it. Of the errors of a union's members the one that got furthest says most; one about a value says
    more than one about its type."""
    errors = error.errors(include_url=False, include_input=False)
    found = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    kind, context = found["type"], found.get("ctx", {})
    location, message = found["loc"], found["msg"]
    if kind == "disagreement":
        location = (*location, context["field"], *context["inside"])
    elif location[-1:] == ("[key]",):
        location, message = location[:-2], f"the key {str(location[-2])[:40]!r}: {message}"
    elif kind.endswith("too_short") and context.get("min_length") == 1:
        message = "it is empty"
    elif kind == "literal_error":
        message = f"it must be {context['expected']}"
    elif kind == "union_tag_invalid":
        message = (
            f"its {context['discriminator']} must be one of {context['expected_tags']}: others are not supported here"
        )
    elif kind == "union_tag_not_found":
        message = f"it has no {context['discriminator']}"
    path = _steps(location, given, _LAST.get(kind)) or location
    where = "".join(_step(part, place == 0) for place, part in enumerate(path))[:MAX_TOLD]
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where}", param=where, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    return ApiError(400, f"Invalid '{where}': {message[:MAX_TOLD]}", param=where, code="invalid_value")


# Errors whose location ends with a field of an object in any case: what the object has of it.
_LAST: dict[str, Callable[[dict[str, Any], int | str], bool]] = {
    "disagreement": lambda given, field: True,
    "extra_forbidden": lambda given, field: field in given,
    "missing": lambda given, field: given.get(str(field)) is None,
}


def _steps(
    location: Sequence[int | str], given: Any, last: Callable[[dict[str, Any], int | str], bool] | None
) -> list[int | str] | None:
    """Of a location the fields and places that the client wrote: pydantic puts the names and tags of unions' members between
    them, and a tag can be called as a field is. The longest way through what was given is the right one.

    Args:
        last: whether an object can be the one whose field the last part is; None: the last part need not be one.
    """
    if not location:
        return []
    part, *rest = location
    if last is not None and not rest:
        return [part] if isinstance(given, dict) and last(given, part) else None
    ways = []
    if (isinstance(given, dict) and part in given) or (isinstance(given, list) and part in range(len(given))):
        inside = _steps(rest, given[part], last)  # type: ignore[index]  # a key of the one, a place in the other
        ways.append(None if inside is None else [part, *inside])
    ways.append(_steps(rest, given, last))
    return max((way for way in ways if way is not None), key=len, default=None)


def _step(part: int | str, first: bool) -> str:
    """One part of a path: a field, or a place in a list."""
    if isinstance(part, int):
        return f"[{part}]"
    if not (part.replace("_", "").isalnum() and part.isascii()):
        return repr(part[:40]) if first else f"[{part[:40]!r}]"
    return part if first else f".{part}"


def components(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """JSON schemas for the OpenAPI description, by name."""
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    defined: dict[str, Any] = schema.get("$defs", {})
    return defined
