"""Schemas that say more than an answer can be held to: as much as can be, unless they are strict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from followed import follows

from arriero.data.tokenizer import Tokenizer
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.structure import Structure
from arriero.errors import GenerationError
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.fields import JsonSchema, JsonSchemaFormat, structure_of
from arriero.serving.openai.messages import FunctionSpec, Tool
from arriero.serving.openai.tool_format import CHATML, structure_with_tools

pytest.importorskip("llguidance")


def with_a(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A schema of an object with `a`."""
    return {"type": "object", "properties": {"a": schema}, **more}


TEXT = {"type": "string"}
KINDS = [with_a({"type": "string"}), {"type": "object", "properties": {"b": {"type": "integer"}}}]
# Of each a part of the schema is left out.
PARTLY = {
    "uniqueItems": with_a({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    "propertyNames": with_a(TEXT, propertyNames={"pattern": "^[a-z]+$"}),
    "not": with_a({"type": "string", "not": {"const": "x"}}),
    "if": with_a(TEXT, **{"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
    "dependentSchemas": with_a(TEXT, dependentSchemas={"a": {"required": ["b"]}}),
    "unevaluatedProperties": with_a(TEXT, unevaluatedProperties=False),
    "binary": with_a({"type": "string", "format": "binary"}),
    "password": with_a({"type": "string", "format": "password"}),
    "int64": with_a({"type": "string", "format": "int64"}),
    "kinds": with_a({"oneOf": KINDS}),
    "uri": with_a({"oneOf": [{"type": "string", "format": "uri"}, TEXT]}),
}
# Of these nothing is left.
NOT_AT_ALL = {
    "look-ahead": with_a({"type": "string", "pattern": "^(?=.*x)y"}),
    "type": with_a({"type": "strnig"}),
    "reference": with_a({"$ref": "https://example.com/schema.json"}),
    "impossible": with_a({"type": "integer", "minimum": 3, "maximum": 2}, required=["a"]),
    "surrogate": with_a(TEXT, title="\ud800"),
}


def tool(name: str, parameters: dict[str, Any] | None, strict: bool | None = None) -> Tool:
    """One whose arguments fit a schema."""
    return Tool(type="function", function=FunctionSpec(name=name, parameters=parameters, strict=strict))


def form_of(schema: dict[str, Any], strict: bool | None = None) -> JsonSchemaFormat:
    """As `response_format`."""
    return JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(name="x", schema=schema, strict=strict))


@pytest.mark.parametrize("strict", [None, False])
@pytest.mark.parametrize("schema", [*PARTLY.values(), *NOT_AT_ALL.values()], ids=[*PARTLY, *NOT_AT_ALL])
def test_arguments_are_held_to_what_can_be(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], strict: bool | None
) -> None:
    tools = [tool("now", None), tool("f", schema, strict)]
    structure = structure_with_tools(CHATML, tools, required=False, parallel=True)
    known = schema in PARTLY.values()
    for arguments, wanted in (
        ({"a": False}, "no" if known else "whole"),
        ({"c": 1}, "whole"),
        ([1], "no"),
    ):
        assert follows(compiler, tokenizer, structure, CHATML.call("f", arguments)) == wanted, arguments
    assert follows(compiler, tokenizer, structure, CHATML.call("now", {"a": 1})) == "no"  # the others stay as they are


@pytest.mark.parametrize("schema", [*PARTLY.values(), *NOT_AT_ALL.values()], ids=[*PARTLY, *NOT_AT_ALL])
def test_a_strict_tool_is_named(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="'f' cannot be kept strictly") as caught:
        structure_with_tools(CHATML, [tool("now", None), tool("f", schema, True)], required=False, parallel=True)
    assert (caught.value.status, caught.value.param) == (400, "tools[1].function.parameters")
    assert "\n" not in caught.value.message
    assert "x-guidance" not in caught.value.message  # the source is not quoted


def test_a_strict_tool_that_can_be_kept_is() -> None:
    structure = structure_with_tools(CHATML, [tool("f", with_a(TEXT), True)], required=True, parallel=False)
    assert "lenient" not in str(structure.source)


@pytest.mark.parametrize("kind", [["object"], ["object", "null"]])
def test_an_object_among_types_is_an_object(compiler: GrammarCompiler, tokenizer: Tokenizer, kind: list[str]) -> None:
    schema = {**with_a(TEXT), "type": kind}
    structure = structure_with_tools(CHATML, [tool("f", schema, True)], required=True, parallel=False)
    assert follows(compiler, tokenizer, structure, CHATML.call("f", {"a": "x"})) == "whole"
    assert follows(compiler, tokenizer, structure, CHATML.call("f", "null")) == "no"
    with pytest.raises(ApiError, match="schema of an object"):
        structure_with_tools(CHATML, [tool("f", {"type": ["array"]})], required=True, parallel=False)


@pytest.mark.parametrize("schema", PARTLY.values(), ids=list(PARTLY))
@pytest.mark.parametrize("tools", [[], [tool("now", None)]], ids=["alone", "tools"])
def test_an_answer_is_held_to_what_can_be(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], tools: list[Tool]
) -> None:
    def structure(strict: bool | None) -> Structure:
        form = form_of(schema, strict)
        if tools:
            return structure_with_tools(CHATML, tools, required=False, parallel=True, answer=form)
        found = structure_of(form)
        assert found is not None
        return found

    for strict in (None, False):
        for value, wanted in (({"a": False}, "no"), ({"c": 1}, "whole"), ([1], "no")):
            assert follows(compiler, tokenizer, structure(strict), json.dumps(value)) == wanted, value
    with pytest.raises(GenerationError, match="cannot be used"):
        compiler.compile(structure(True))


@pytest.mark.parametrize("name", ["look-ahead", "type", "reference", "impossible"])
@pytest.mark.parametrize("tools", [[], [tool("now", None)]], ids=["alone", "tools"])
def test_without_a_schema_that_can_be_an_answer_is_any_json(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str, tools: list[Tool]
) -> None:
    form = form_of(NOT_AT_ALL[name])
    structure = structure_of(form)
    if tools:
        structure = structure_with_tools(CHATML, tools, required=False, parallel=True, answer=form)
    assert structure is not None
    for text, wanted in (('{"a": false}', "whole"), ("[1, 2]", "whole"), ("so", "no")):
        assert follows(compiler, tokenizer, structure, text) == wanted, text


def test_what_is_too_large_is_refused_as_that(compiler: GrammarCompiler) -> None:
    large = with_a({"type": "string", "description": "x" * 70_000})
    for strict in (None, True):
        structure = structure_with_tools(CHATML, [tool("f", large, strict)], required=True, parallel=False)
        with pytest.raises(GenerationError, match="at most 65536 are allowed"):
            compiler.compile(structure)


def test_a_schema_in_vllms_words_is_kept_or_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(GenerationError, match="uniqueItems"):
        compiler.compile(Structure("json_schema", PARTLY["uniqueItems"]))  # type: ignore[arg-type]  # as JSON gives it
