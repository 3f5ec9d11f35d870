"""Schemas that say more than an answer can be held to: as much as can be, unless they are strict."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from followed import follows

from arriero.data.tokenizer import Tokenizer
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.structure import Structure, UnkeptSchemaError, lark_of
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
def test_a_strict_tool_is_named(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    tools = [tool("now", None), tool("f", schema, True)]
    structure = structure_with_tools(CHATML, tools, required=False, parallel=True)
    with pytest.raises(UnkeptSchemaError, match="'f' cannot be kept strictly") as caught:
        compiler.compile(structure)
    assert caught.value.place == "tools[1].function.parameters"
    assert "\n" not in str(caught.value)
    assert "x-guidance" not in str(caught.value)  # the source is not quoted


def test_a_strict_tool_that_can_be_kept_is() -> None:
    structure = structure_with_tools(CHATML, [tool("f", with_a(TEXT), True)], required=True, parallel=False)
    assert "lenient" not in lark_of(structure)


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
    with pytest.raises(GenerationError, match=r"cannot be (used|kept)"):
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


FREE = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        (FREE, False),
        ({**FREE, "patternProperties": {"^a": {}}, "additionalProperties": False}, False),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, FREE]}}, "required": ["a"]}, False),
        ({"type": "array", "items": FREE, "minItems": 1}, False),
        ({**FREE, "required": ["a", "b"]}, True),
        ({**FREE, "minProperties": 1}, True),
        ({"enum": [FREE]}, True),
        ({**FREE, "type": ["string", "null"]}, True),
    ],
)
def test_a_number_of_members_with_any_names_is_not_held(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], held: bool
) -> None:
    """A member that comes twice is one to who reads the JSON, and two to the grammar."""
    asked = Structure("json_schema", schema)  # type: ignore[arg-type]  # as JSON gives it
    strict = structure_with_tools(CHATML, [tool("f", {**with_a(schema)}, True)], required=True, parallel=False)
    if held:
        compiler.compile(asked)
        compiler.compile(strict)
        return
    for structure in (asked, strict):
        with pytest.raises(GenerationError, match="minProperties 2 of an object whose members may have any names"):
            compiler.compile(structure)
    lenient = structure_with_tools(CHATML, [tool("f", {**with_a(schema)})], required=True, parallel=False)
    assert follows(compiler, tokenizer, lenient, CHATML.call("f", {"a": False})) == "no"


def many_ways(number: int) -> dict[str, Any]:
    """A schema of 2 kB and some thousand combinations, another one for each number."""
    kinds = [
        {
            "anyOf": [
                {"type": "object", "properties": {f"p{number}_{k}_{i}": {"type": "string", "pattern": f"^a{i}b*$"}}}
                for i in range(4)
            ]
        }
        for k in range(6)
    ]
    return {"type": "object", "allOf": kinds}


def test_schemas_of_many_combinations_are_not_checked_for_ever(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever prepares a request does not check them at all; who compiles them stops after a while."""
    began = time.thread_time()
    tools = [tool(f"f{number}", many_ways(number)) for number in range(6)]
    structure = structure_with_tools(CHATML, tools, required=True, parallel=False)
    assert time.thread_time() - began < 0.2
    monkeypatch.setattr("arriero.engine.structure.MAX_CHECK_SECONDS", 0.05)
    monkeypatch.setattr("arriero.engine.json_schema._problem", slowly := Slowly())
    with pytest.raises(GenerationError, match="its 6 schemas have so many combinations"):
        compiler.compile(structure)
    assert slowly.calls == 1


class Slowly:
    """Takes a tenth of a second of the processor for a schema.

    Attributes:
        calls: how often it was asked.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, form: str) -> str:
        self.calls += 1
        began = time.thread_time()
        while time.thread_time() - began < 0.1:
            pass
        return ""


def test_a_schema_in_vllms_words_is_kept_or_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(GenerationError, match="uniqueItems"):
        compiler.compile(Structure("json_schema", PARTLY["uniqueItems"]))  # type: ignore[arg-type]  # as JSON gives it
