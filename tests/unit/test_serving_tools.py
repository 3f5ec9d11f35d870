"""Calls of tools: how models write them, what the grammar allows, and how calls are found in a growing text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.grammar import GrammarCompiler
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.call_reader import CallReader
from arriero.serving.openai.chat import read_calls
from arriero.serving.openai.fields import JsonObjectFormat
from arriero.serving.openai.messages import FunctionSpec, Tool
from arriero.serving.openai.tool_format import (
    CHATML,
    LLAMA3,
    TAUGHT,
    ToolFormat,
    format_of,
    structure_with_tools,
    taught,
)

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(type="function", function=FunctionSpec(name="weather", parameters=SCHEMA)),
    Tool(type="function", function=FunctionSpec(name="now")),
]
ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_CALL = f'{{"name": "weather", "parameters": {ROME}}}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def allows(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, form: ToolFormat, **options: Any) -> str:
    """Whether an answer may be this text ("whole"), may begin so ("beginning"), or may not ("no")."""
    asked = {"required": False, "parallel": True, **options}
    state = compiler.compile(structure_with_tools(form, TOOLS, **asked)).start()
    for token in tokenizer.encode(text):
        if not state.allowed[token]:
            return "no"
        state.advance(token)
    return "whole" if state.accepting else "beginning"


@pytest.mark.parametrize(
    ("text", "form", "options", "wanted"),
    [
        ("Just an answer, 1 < 2.", CHATML, {}, "whole"),
        ("", CHATML, {}, "whole"),
        (CALL, CHATML, {}, "whole"),
        (f"Let me see.\n{CALL}", CHATML, {}, "whole"),
        (f"{CALL}\n{NOW}", CHATML, {}, "whole"),
        (f"{CALL}\n{NOW}", CHATML, {"parallel": False}, "no"),
        ("I use <tool_call> for", CHATML, {}, "no"),
        (CALL.replace("Rome", 'Rome", "x": "y'), CHATML, {}, "no"),
        (CALL.replace("weather", "other"), CHATML, {}, "no"),
        (CALL[:40], CHATML, {}, "beginning"),
        ("Just an answer.", CHATML, {"required": True}, "no"),
        (NOW, CHATML, {"required": True}, "whole"),
        (NOW.replace("{}", '{"a": 1}'), CHATML, {}, "no"),
        ("", CHATML, {"required": True}, "beginning"),
        ("Just an answer {with braces}.", LLAMA3, {}, "whole"),
        (LLAMA_CALL, LLAMA3, {}, "whole"),
        (LLAMA_CALL, LLAMA3, {"required": True}, "whole"),
        ("Just", LLAMA3, {"required": True}, "no"),
        ('{"name": "weather", "parameters": {"days": 3}}', LLAMA3, {}, "no"),
        ('{"a": 1}', LLAMA3, {}, "no"),
        ('{"a": 1}', CHATML, {"answer": JsonObjectFormat(type="json_object")}, "whole"),
        (CALL, CHATML, {"answer": JsonObjectFormat(type="json_object")}, "whole"),
        ("no object", CHATML, {"answer": JsonObjectFormat(type="json_object")}, "no"),
    ],
)
def test_the_grammar_allows_text_and_calls_that_fit(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, form: ToolFormat, options: dict[str, Any], wanted: str
) -> None:
    assert allows(compiler, tokenizer, text, form, **options) == wanted


def test_parameters_must_be_an_objects_schema() -> None:
    tool = Tool(type="function", function=FunctionSpec(name="f", parameters={"type": "array"}))
    with pytest.raises(ApiError, match="schema of an object"):
        structure_with_tools(CHATML, [tool], required=True, parallel=False)


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (CHATML, "Nothing to call", "Nothing to call", []),
        (CHATML, CALL, None, [("weather", ROME)]),
        (CHATML, f"I look.\n\n{CALL}\n{NOW}", "I look.", [("weather", ROME), ("now", "{}")]),
        (CHATML, "a <b> c \n", "a <b> c \n", []),
        (CHATML, CALL[:48], None, [("weather", '{"c')]),
        (CHATML, f"{CALL.replace('Rome', 'a}b]c')}", None, [("weather", '{"city": "a}b]c"}')]),
        (CHATML, CALL.replace("Rome", 'say \\"}\\\\'), None, [("weather", '{"city": "say \\"}\\\\"}')]),
        (LLAMA3, LLAMA_CALL, None, [("weather", ROME)]),
        (LLAMA3, 'It is {"name": "weather"', 'It is {"name": "weather"', []),
        (LLAMA3, '{"name": "wea', None, []),
        (LLAMA3, "", "", []),
    ],
)
@given(data=st.data())
def test_calls_are_found_however_the_text_comes(
    form: ToolFormat, text: str, content: str | None, calls: list[tuple[str, str]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    reader = CallReader(form)
    found: list[list[str]] = []
    told = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for part in reader.push(text[start:end]):
            told += _note(found, part)
    for part in reader.finish():
        told += _note(found, part)
    assert [tuple(call) for call in found] == calls
    assert (told or None) == (content or None)
    whole, listed = read_calls(form, text)
    assert (whole or None) == (content or None)
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in listed] == calls
    assert len({call["id"] for call in listed}) == len(listed)


def _note(found: list[list[str]], part: Any) -> str:
    if part.call is None:
        return str(part.text)
    if part.name is not None:
        found.append([part.name, ""])
    found[part.call][1] += part.text
    return ""


QWEN = "{%- if tools %}{{- '<tools>' }}{% endif %}{{ '<tool_call>\\n{\"name\": ' }}"
LLAMA31 = '{%- if tools is not none %}{{- \'{"name": function name, "parameters": dictionary}\' }}{% endif %}'


def test_the_template_says_how_calls_are_written() -> None:
    assert format_of(QWEN) is CHATML
    assert format_of(LLAMA31) is LLAMA3
    assert format_of("{% for message in messages %}{{ message.content }}{% endfor %}") is TAUGHT
    assert format_of(None) is TAUGHT


def test_a_template_without_tools_is_taught_them() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rome?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    told = taught(turns, TOOLS)
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be kind.")
    within = told[0]["content"].split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line)["function"]["name"] for line in within.splitlines()] == ["weather", "now"]
    assert told[2]["content"] == CALL
    assert told[3]["content"] == "<tool_response>\nsunny\n</tool_response>"
    assert taught(turns[1:2], TOOLS)[0]["role"] == "system"
    assert turns[0]["content"] == "Be kind."
