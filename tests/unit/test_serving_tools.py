"""Calls of tools: how models write them, what the grammar allows, and how calls are found in a growing text."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from followed import follows

from arriero.data.chat_template import ChatTemplate
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.answer import Generation
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.sampling_params import SamplingParams
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.answer_reader import Message
from arriero.serving.openai.call_reader import CallReader, Calls
from arriero.serving.openai.chat import ChatWork, chat_prompt
from arriero.serving.openai.fields import JsonObjectFormat, JsonSchema, JsonSchemaFormat
from arriero.serving.openai.messages import FunctionSpec, Tool
from arriero.serving.openai.requests import ChatRequest
from arriero.serving.openai.response_items import Items
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.openai.responses import ResponseAnswer
from arriero.serving.openai.token_text import MessageLogprobs, TokenTexts
from arriero.serving.openai.tool_format import (
    CHATML,
    LLAMA3,
    TAUGHT,
    ToolFormat,
    format_of,
    structure_with_tools,
    taught,
)
from arriero.serving.service import ServedModel

jsonschema = pytest.importorskip("jsonschema")

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
NAMES = ("weather", "now")
ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_CALL = f'{{"name": "weather", "parameters": {ROME}}}'


def allows(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, form: ToolFormat, **options: Any) -> str:
    asked = {"required": False, "parallel": True, **options}
    return follows(compiler, tokenizer, structure_with_tools(form, TOOLS, **asked), text)


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
    ("form", "text", "content", "calls", "cut"),
    [
        (CHATML, "Nothing to call", "Nothing to call", [], False),
        (CHATML, CALL, None, [("weather", ROME)], False),
        (CHATML, f"I look.\n\n{CALL}\n{NOW}", "I look.", [("weather", ROME), ("now", "{}")], False),
        (CHATML, "a <b> c \n", "a <b> c \n", [], False),
        (CHATML, "a <b> c \n", "a <b> c \n", [], True),
        (CHATML, f"{CALL.replace('Rome', 'a}b]c')}", None, [("weather", '{"city": "a}b]c"}')], False),
        (CHATML, CALL.replace("Rome", 'say \\"}\\\\'), None, [("weather", '{"city": "say \\"}\\\\"}')], False),
        (CHATML, "", "", [], True),
        (CHATML, "<", None, [], True),
        (CHATML, "1 <", "1 <", [], True),
        (CHATML, "1 <tool", "1", [], True),
        (CHATML, "1 <tool", "1 <tool", [], False),
        *((CHATML, CALL[:end], None, [], True) for end in (6, 11, 12, 13, 22, 29)),
        (CHATML, f"I look.\n{CALL[:13]}", "I look.", [], True),
        (CHATML, CALL[:30], None, [("weather", "")], True),
        (CHATML, CALL[:40], None, [("weather", "")], True),
        (CHATML, CALL[:48], None, [("weather", '{"c')], True),
        (CHATML, CALL[:-5], None, [("weather", ROME)], True),
        (CHATML, f"{CALL}\n", None, [("weather", ROME)], True),
        (CHATML, f"{CALL}\n<", None, [("weather", ROME)], True),
        (CHATML, f"{CALL}\n{NOW[:25]}", None, [("weather", ROME)], True),
        (LLAMA3, LLAMA_CALL, None, [("weather", ROME)], False),
        (LLAMA3, 'It is {"name": "weather"', 'It is {"name": "weather"', [], True),
        (LLAMA3, "{", None, [], True),
        (LLAMA3, '{"name": "wea', None, [], True),
        (LLAMA3, '{"name": "weather", "par', None, [("weather", "")], True),
        (LLAMA3, '{"name": "Bob"}', '{"name": "Bob"}', [], False),
        (LLAMA3, '{"name": "Bob", "param', '{"name": "Bob", "param', [], True),
        (LLAMA3, '{"name": "weather", "age": 3', '{"name": "weather", "age": 3', [], True),
        (LLAMA3, '{"name": "weather", "parameters": 3}', '{"name": "weather", "parameters": 3}', [], False),
        (LLAMA3, f'{{"name": "Bob", "parameters": {ROME}}}', f'{{"name": "Bob", "parameters": {ROME}}}', [], False),
        (LLAMA3, "", "", [], False),
    ],
)
@given(data=st.data())
def test_calls_are_found_however_the_text_comes(
    form: ToolFormat, text: str, content: str | None, calls: list[tuple[str, str]], cut: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    reader = CallReader(Calls(form, NAMES))
    found: list[list[str]] = []
    told = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for part in reader.push(text[start:end]):
            told += _note(found, part)
    for part in reader.finish(cut=cut):
        told += _note(found, part)
    assert [tuple(call) for call in found] == calls
    assert (told or None) == (content or None)
    whole = Message.read(Calls(form, NAMES), Generation([], text, "length" if cut else "stop", 1))
    listed = whole.calls
    assert whole.content == content
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in listed] == calls
    assert len({call["id"] for call in listed}) == len(listed)


BESIDE_JSON = Calls(LLAMA3, NAMES, beside_json=True)


@pytest.mark.parametrize(
    ("text", "content", "calls", "cut"),
    [
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', [], False),
        ('{"na', '{"na', [], True),
        ('{"name": "wea', '{"name": "wea', [], True),
        ('{"name": "weather", "par', None, [("weather", "")], True),
        (LLAMA_CALL, None, [("weather", ROME)], False),
        ("[1, 2", "[1, 2", [], True),
    ],
)
def test_beside_json_only_what_must_be_a_call_is_one(
    text: str, content: str | None, calls: list[tuple[str, str]], cut: bool
) -> None:
    whole = Message.read(BESIDE_JSON, Generation([], text, "length" if cut else "stop", 1))
    assert whole.content == content
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in whole.calls] == calls


def test_json_that_is_no_call_is_told_while_it_comes() -> None:
    reader, told = CallReader(BESIDE_JSON), []
    for character in '{"name": "Bob", "age": 3}':
        told += [part.text for part in reader.push(character)]
    assert len(told) > 10
    assert "".join(told) == '{"name": "Bob", "age": 3}'


ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
WISHES = {
    "object": JsonObjectFormat(type="json_object"),
    "schema": JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(name="x", schema=ANSWER)),
    "strict": JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(name="x", schema=ANSWER, strict=True)),
    "any": JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(name="x", schema={})),
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_json_answer_and_a_call_are_both_possible(compiler: GrammarCompiler, tokenizer: Tokenizer, wish: str) -> None:
    """The LLaMA 3 way a call has no opening that would tell it from JSON, by jsonschema's judgement of the answers."""
    for text in ('{"name": "Bob", "age": 3}', '{"name": "weather"}', '{"name": "weather", "age": 3}', '{"name":"now"}'):
        jsonschema.validate(json.loads(text), ANSWER)
        assert allows(compiler, tokenizer, text, LLAMA3, answer=WISHES[wish]) == "whole", text
    for text in (LLAMA_CALL, '{"name": "now", "parameters": {}}'):
        assert allows(compiler, tokenizer, text, LLAMA3, answer=WISHES[wish]) == "whole", text
        assert Message.read(BESIDE_JSON, Generation([], text, "stop", 1)).calls
    for text in ('{"name": "weather", "parameters": {"town": "Rome"}}', "so", f"{LLAMA_CALL}{LLAMA_CALL}"):
        assert allows(compiler, tokenizer, text, LLAMA3, answer=WISHES[wish]) == "no", text
    for text, wanted in (("{}", wish in ("object", "any")), ('{"a": {"parameters": 1}}', wish in ("object", "any"))):
        assert allows(compiler, tokenizer, text, LLAMA3, answer=WISHES[wish]) == ("whole" if wanted else "no"), text


def test_an_answer_that_has_parameters_of_its_own_keeps_them(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"parameters": {"type": "integer"}}, "required": ["parameters"]}
    own = JsonSchemaFormat(type="json_schema", json_schema=JsonSchema(name="x", schema=schema))
    assert allows(compiler, tokenizer, '{"parameters": 3}', LLAMA3, answer=own) == "whole"
    assert allows(compiler, tokenizer, LLAMA_CALL, LLAMA3, answer=own) == "whole"


def _note(found: list[list[str]], part: Any) -> str:
    if part.call is None:
        return str(part.text)
    if part.name is not None:
        found.append([part.name, ""])
    found[part.call][1] += part.text
    return ""


def test_log_probabilities_of_a_message_end_where_its_calls_begin(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"naïve 東.\n{CALL}")
    logprobs = MessageLogprobs(TokenTexts(tokenizer))
    items, reader, events = Items(logprobs), CallReader(Calls(CHATML, NAMES)), []
    decoder = tokenizer.stream_decoder()
    for token in ids:
        logprobs.push([token], [TokenLogprobs(-1.0, ((token, -1.0),))])
        for part in reader.push(decoder.push(token)):
            events += items.take(part)
    events += items.end("completed")
    message, call = items.output
    assert (message["content"][0]["text"], call["arguments"]) == ("naïve 東.", ROME)
    told = message["content"][0]["logprobs"]
    assert b"".join(bytes(one["bytes"]) for one in told).decode().strip() == "naïve 東."
    assert [
        one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]
    ] == told


@pytest.mark.parametrize("text", [None, {}, {"verbosity": "low"}, {"format": {"type": "json_object"}}])
def test_a_response_says_the_form_of_its_text(tokenizer: Tokenizer, text: dict[str, Any] | None) -> None:
    service: Any = SimpleNamespace(tokenizer=tokenizer)
    body = ResponseRequest.model_validate({"input": "x", "text": text})
    answer = ResponseAnswer(service, body, ServedModel("tiny"), ChatWork([1], SamplingParams(), None))
    assert answer.object("in_progress", [], None)["text"] == {"format": {"type": "text"}, **(text or {})}


def test_an_error_goes_on_with_the_sequence(tokenizer: Tokenizer) -> None:
    service: Any = SimpleNamespace(tokenizer=tokenizer)
    body, work = ResponseRequest(input="x"), ChatWork([1], SamplingParams(), None)
    answer = ResponseAnswer(service, body, ServedModel("tiny"), work)

    class Failing:
        async def pieces(self) -> Any:
            raise ApiError(503, "gone", code="busy")
            yield

    async def run() -> list[Any]:
        told = []
        job: Any = Failing()
        try:
            async for event in answer.events(job):
                told.append(event)
        except ApiError as error:
            told.append(answer.failed(error))
        return told

    events = asyncio.run(run())
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "error"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
    assert (events[-1]["code"], events[-1]["message"]) == ("busy", "gone")


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


# Mistral's v0.3 (of which only what it refuses matters), Mistral's v0.1 and Gemma's first
ROLES_IN_TURNS = """
{%- if messages[0]["role"] == "system" %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}{% if tools is not none %}{{ tools }}{% endif %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"""
NO_SYSTEM = """{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
[{{ message.role }}]{{ message.content }}{% endfor %}"""
GEMMA = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"""


def two_calls(*more: dict[str, Any], **fields: Any) -> ChatRequest:
    """What a client sends after two calls."""
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "weather", "arguments": ROME}} for i in (1, 2)
    ]
    results = [{"role": "tool", "tool_call_id": f"call0000{i}", "content": f"sunny {i}"} for i in (1, 2)]
    turns = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "tool_calls": calls}, *results, *more]
    return ChatRequest.model_validate({"messages": turns, "tools": [tool.model_dump() for tool in TOOLS], **fields})


@pytest.mark.parametrize("template", [ROLES_IN_TURNS, NO_SYSTEM, GEMMA])
def test_templates_that_want_the_roles_in_turns_or_no_system_message(template: str) -> None:
    own = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    own._template = ChatTemplate(template)

    def parts(body: ChatRequest) -> list[str]:
        ids, form = chat_prompt(own, body)
        assert form is TAUGHT
        return own.decode(ids, skip_special_tokens=False).strip().split("[user]")

    results = "".join(f"<tool_response>\nsunny {i}\n</tool_response>\n" for i in (1, 2))
    before, first, second = parts(two_calls())
    assert second.strip() == results.strip()
    assert "<tools>" in (before if template is ROLES_IN_TURNS else first)
    assert "[system]" not in before or template is ROLES_IN_TURNS
    assert first.partition("[assistant]")[0].strip().endswith("Rome?")
    assert parts(two_calls({"role": "user", "content": "And?"}))[2].strip() == f"{results}And?"
    # a system message of the client's own is refused as without tools
    own_system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    body = two_calls().model_copy(update={"messages": ChatRequest.model_validate({"messages": own_system}).messages})
    if template is ROLES_IN_TURNS:
        assert "Be kind.\n\nYou may call" in parts(body)[0]
    else:
        with pytest.raises(ApiError, match=r"alternate|System role not supported"):
            chat_prompt(own, body)


def test_the_template_for_tools_says_how_calls_are_written() -> None:
    """Hermes ships a plain template and one named `tool_use`."""
    own = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    own._template, own._tool_template = ChatTemplate("plain"), ChatTemplate(QWEN)
    body = two_calls()
    ids, form = chat_prompt(own, body)
    assert form is CHATML
    assert own.decode(ids).startswith("<tools>")
    ids, form = chat_prompt(own, two_calls(tool_choice="none"))
    assert form is None
    assert own.decode(ids) == "plain"
