"""JSON schemas as grammars have them: what they can hold an answer to, and what they cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from arriero.errors import GenerationError, require

# Between two parts of a JSON text at most the one blank that models are used to write: where blanks may come, a weak model
# goes on with them until its answer is cut.
JSON_BLANKS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# What it takes for a schema that says more than it can hold an answer to: the rest of the schema holds.
BEST_EFFORT = {"lenient": True, "coerce_one_of": True}
# Where schemas stand in schemas; other keys, such as `const`, hold values.
IN_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ALONE = (
    "items",
    "additionalProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
)


def json_text(value: Any) -> str:
    """A schema as JSON text.

    Raises:
        GenerationError: it is not JSON.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {error}") from error


def parsed_schema(text: str) -> dict[str, Any]:
    """A schema of its JSON text.

    Raises:
        GenerationError: it is no JSON object, nor true.
    """
    try:
        schema = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise GenerationError(f"the JSON schema is not JSON: {error}") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GenerationError(f"the JSON schema is {type(schema).__name__}: it must be an object")
    return schema


def json_form(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A schema as grammars have it after `%json`. It gets our options for its own: such as to ignore what is not supported
    could make of an answer one that does not fit, which only a request can allow (`lenient`)."""
    return {**schema, "x-guidance": {**JSON_BLANKS, **(BEST_EFFORT if lenient else {})}}


def best_form(schema: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """The form that holds as much of a schema as can be; if that is nothing, the form of another schema."""
    form = json_form(schema, lenient=True)
    return json_form(otherwise) if form_problem(form) else form


def schema_problem(schema: Mapping[str, Any]) -> str:
    """Why no grammar can hold an answer to all of this schema, in one line; "" if one can."""
    return unheld(schema) or form_problem(json_form(schema))


def form_problem(form: Mapping[str, Any]) -> str:
    """Why no grammar can have this after `%json`, in one line; "" if one can. A short schema of many combinations takes
    seconds."""
    require("llguidance", "serve")
    return _problem(json.dumps(form))


@lru_cache(maxsize=256)  # an agent sends the same tools with each of its requests
def _problem(form: str) -> str:
    import llguidance

    told = llguidance.LLMatcher.validate_grammar(f"start: %json {form}")
    told = re.sub(r"\n[\s^]*(?=\n)", "", told.split("\n   1 | ", 1)[0])  # without the source and marks in it
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", told).split())


def unheld(schema: Any) -> str:
    """What a grammar takes and does not hold: it counts a member that comes twice as two; "" if there is nothing such."""
    for one in _schemas(schema):
        least = one.get("minProperties", 0)
        kind = one.get("type", "object")
        free = one.get("additionalProperties", True) is not False or one.get("patternProperties")
        free = free and "object" in (kind if isinstance(kind, list) else [kind])
        if free and isinstance(least, int | float) and least > max(1, _required(one)):
            return (
                f"minProperties {least:g} of an object whose members may have any names cannot be held, for one of them may "
                "come twice: name those that must be there in required"
            )
    return ""


def _required(schema: Mapping[str, Any]) -> int:
    """Members that are there in any case, each under a name of its own."""
    names = schema.get("required")
    return len({name for name in names if isinstance(name, str)}) if isinstance(names, list) else 0


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those in it, however deep."""
    left = [schema]
    while left:
        one = left.pop()
        if not isinstance(one, dict):
            continue
        yield one
        for key in IN_NAMED:
            inside = one.get(key)
            left += inside.values() if isinstance(inside, dict) else ()
        for key in IN_LISTS:
            inside = one.get(key)
            left += inside if isinstance(inside, list) else ()
        left += [one.get(key) for key in ALONE]
