"""Bodies of requests: what they mean, what is refused and how the field is named, what other servers' clients send."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.data.chat_template import ChatTemplate
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.structure import Structure
from arriero.engine.ticket import RefusedError
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.api_errors import ApiError, api_error
from arriero.serving.body import check
from arriero.serving.openai.chat import chat_prompt
from arriero.serving.openai.completions import prompts_of
from arriero.serving.openai.messages import for_template
from arriero.serving.openai.requests import ChatRequest, CompletionRequest, TokenizeRequest
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.openai.tool_format import taught
from arriero.serving.seed_chat import SeedChatRequest
from arriero.serving.strict_json import parse_object
from arriero.serving.text_bound import TextBound

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
JSON = {"type": "json_object"}
GOES_ON = {"continue_final_message": True}
TOOL = {"type": "function", "function": {"name": "f"}}
FORM, NAMED = {"type": "json_schema"}, {"json_schema": {"name": "x"}}
ANSWERED = {"role": "tool", "tool_call_id": "c9", "content": "x"}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    """`tool_choice` that leaves some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (ChatRequest, {**HELLO, "top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs: true"),
        (ChatRequest, {**HELLO, "tools": [TOOL, TOOL]}, "tools", "two tools have the same name"),
        (ChatRequest, {**HELLO, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        (ChatRequest, {**HELLO, "tool_choice": TOOL}, "tool_choice", "not among the tools"),
        (ChatRequest, {**HELLO, "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
        (ChatRequest, {**HELLO, "logit_bias": {"５": 1}}, "logit_bias", "the key '５'"),
        (ChatRequest, {**HELLO, "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        (ChatRequest, {**HELLO, "stream_options": {"Foo": 1}}, "stream_options.Foo", "Unrecognized"),
        (ChatRequest, {**HELLO, "stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        (ChatRequest, {**HELLO, "stream_options": {}, "stream": False}, "stream_options", "needs stream: true"),
        (CompletionRequest, {"prompt": "a", "stream_options": {}}, "stream_options", "needs stream: true"),
        (ResponseRequest, {"input": "a", "stream_options": {}}, "stream_options", "needs stream: true"),
        (ChatRequest, {**HELLO, "temperatur": 1}, "temperatur", "Unrecognized"),
        (ChatRequest, {**HELLO, "ü": 1}, "'ü'", "Unrecognized"),
        (ChatRequest, {"messages": []}, "messages", "it is empty"),
        (ChatRequest, {"messages": None}, "messages", "Missing"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "M",
        ),
        (CompletionRequest, {"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0, which needs echo: true"),
        (CompletionRequest, {"prompt": "a", "n": 3, "best_of": 2}, "best_of", "best_of is less than n"),
        (CompletionRequest, {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (CompletionRequest, {"prompt": []}, "prompt", "it is empty"),
        (CompletionRequest, {"prompt": [[]]}, "prompt[0]", "it is empty"),
        (CompletionRequest, {"prompt": 5}, "prompt", "valid string"),
        (TokenizeRequest, {}, "prompt", "one of them"),
        (ResponseRequest, {"input": "a", "include": ["all"]}, "include[0]", "it must be 'message.output_text"),
        (ResponseRequest, {"input": "a", "top_logprobs": 2}, "top_logprobs", "needs include"),
        (ChatRequest, {**HELLO, "guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one form"),
        (ChatRequest, {**HELLO, "guided_regex": "a", "tools": [TOOL]}, "guided_regex", "or tools, not both"),
        (ChatRequest, {**HELLO, "guided_json": {}, "response_format": JSON}, "guided_json", "or response_format"),
        (ChatRequest, {**HELLO, "guided_grammar": " "}, "guided_grammar", "is empty"),
        (ChatRequest, {**HELLO, "structured_outputs": {}}, "structured_outputs", "one of them"),
        (ChatRequest, {**HELLO, "structured_outputs": {"yaml": 1}}, "structured_outputs.yaml", "Unrecognized"),
        (ChatRequest, {**HELLO, "skip_special_tokens": False}, "skip_special_tokens", "leave it out"),
        (ChatRequest, {**HELLO, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "'messages'"),
        (ChatRequest, {**HELLO, "chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "'bos_token'"),
        (ChatRequest, {**HELLO, "chat_template_kwargs": {"_x": 1}}, "chat_template_kwargs", "the key '_x'"),
        (ChatRequest, {**HELLO, "chat_template_kwargs": {"a": []}}, "chat_template_kwargs.a", "valid"),
        (ChatRequest, {**HELLO, **GOES_ON, "add_generation_prompt": True}, "continue_final_message", "one of them"),
        (ChatRequest, {**HELLO, "use_beam_search": True}, "use_beam_search", "no beam search"),
        (ChatRequest, {**HELLO, "use_beam_search": 0}, "use_beam_search", "no beam search"),
        (CompletionRequest, {"prompt": "a", "length_penalty": 1.5}, "length_penalty", "no beam search"),
        (ChatRequest, {**HELLO, "prompt_logprobs": 1}, "prompt_logprobs", "/v1/completions"),
        (CompletionRequest, {"prompt": "a", "truncate_prompt_tokens": 8}, "truncate_prompt_tokens", "a shorter one"),
        (ChatRequest, {**HELLO, "priority": -1}, "priority", "greater than or equal to 0"),
        (CompletionRequest, {"prompt": "a", "suffix": "b"}, "suffix", "at their end only"),
        (ChatRequest, {**HELLO, "tools": [{"type": "web_search"}]}, "tools[0].type", "tools are functions here"),
        (ChatRequest, {**HELLO, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "Missing"),
        (ResponseRequest, {"input": "a", "previous_response_id": "r"}, "previous_response_id", "nothing is kept"),
        (ResponseRequest, {"input": "a", "background": True}, "background", "nothing is kept"),
        (ResponseRequest, {"input": "a", "truncation": "auto"}, "truncation", "a shorter one"),
        (ResponseRequest, {"input": "a", "text": {"format": {**FORM, "name": "x"}}}, "text.format.schema", "Missing"),
        (ChatRequest, {**HELLO, "response_format": FORM}, "response_format.json_schema", "Missing"),
        (ChatRequest, {**HELLO, "response_format": {**FORM, "json_schema": 3}}, "response_format.json_schema", "valid"),
        (
            ChatRequest,
            {**HELLO, "response_format": {**FORM, "json_schema": {"name": "x", "schema": {}}, "x": 1}},
            "response_format.x",
            "Unrecognized",
        ),
        (ChatRequest, {**HELLO, "response_format": {**FORM, **NAMED}}, "response_format.json_schema.schema", "Missing"),
        (ChatRequest, {**HELLO, "response_format": {"type": "xml"}}, "response_format", "not supported here"),
        (ChatRequest, {"messages": [{"role": "text", "content": "x"}]}, "messages[0]", "its 'role' must be one of"),
        (ChatRequest, {"messages": [ANSWERED]}, "messages[0].tool_call_id", "'c9' is no call"),
        (
            ResponseRequest,
            {"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]},
            "input[0].call_id",
            "'c9'",
        ),
        *(
            (ResponseRequest, {"input": [item]}, f"input[0].{field}", message)
            for item, field, message in (
                ({"type": "function_call_output", "call_id": "x"}, "output", "Missing"),
                ({"type": "function_call", "call_id": "a", "name": "b", "arguments": {}}, "arguments", "valid string"),
                ({"type": "function_call", "call_id": "a", "name": "b", "content": "c"}, "arguments", "Missing"),
                ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "content", "text only"),
                ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "content", "text only"),
                ({"role": "user", "content": [{"type": "input_text"}]}, "content[0].text", "Missing"),
                ({"type": "item_reference", "id": "x"}, "type", "nothing is kept here"),
                ({"type": "web_search_call", "id": "x"}, "type", "it must be 'message', 'function_call'"),
                ({"type": ["message"]}, "type", "it must be 'message'"),
                ({"role": "user", "text": "x"}, "content", "Missing"),
            )
        ),
        (ChatRequest, {**HELLO, "tools": [TOOL], "tool_choice": allowed("g")}, "tool_choice", "not among the tools"),
        (SeedChatRequest, {"context": "x", "history": ["odd"]}, "history", "pairs"),
        (SeedChatRequest, {"context": "x", "history": "no json"}, "history", "no JSON list"),
    ],
)
def test_an_error_names_the_field(kind: Any, body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as found:
        check(parse_object, json.dumps(body).encode(), kind)
    assert found.value.param == param
    assert message in found.value.message
    assert f"'{param}'" in found.value.message or found.value.message.endswith(param)


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"structured_outputs": {"json": {"type": "integer"}}}, Structure("json_schema", '{"type": "integer"}')),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, Structure("json_schema", '{"type": "integer"}')),
        ({"structured_outputs": {"regex": "a+"}}, Structure("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Structure("choice", ("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Structure("grammar", 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, Structure("json_object")),
        ({"guided_json": {"type": "integer"}}, Structure("json_schema", '{"type": "integer"}')),
        ({"guided_regex": "a+"}, Structure("regex", "a+")),
        ({"guided_choice": ["a"]}, Structure("choice", ("a",))),
        ({"guided_grammar": 'start: "a"', "structured_outputs": None}, Structure("grammar", 'start: "a"')),
        ({}, None),
    ],
)
def test_forms_in_vllms_words(fields: dict[str, Any], structure: Structure | None) -> None:
    for kind, body in ((ChatRequest, HELLO), (CompletionRequest, {"prompt": "a"})):
        asked: Any = check(parse_object, json.dumps({**body, **fields}).encode(), kind)
        assert asked.sampling(5).structure == structure


def test_what_a_model_said_elsewhere_is_taken() -> None:
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed": {}}}
    turns = [
        {"role": "user", "content": "Hello", "name": None},
        {
            "role": "assistant",
            "content": "Hi",
            "reasoning_content": "a thought",
            "annotations": [{"type": "x"}],
            "audio": None,
        },
        {"role": "assistant", "content": "Hi", "reasoning": "another", "function_call": None, "provider": {"a": 1}},
        {"role": "assistant", "content": None, "refusal": "No.", "reasoning": {"effort": "low"}},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No!"}, {"type": "text", "text": "x", "id": 1}],
        },
        {"role": "assistant", "tool_calls": [call]},
    ]
    asked = check(parse_object, json.dumps({"messages": turns}).encode(), ChatRequest)
    told = [for_template(message) for message in asked.messages]
    assert [turn["content"] for turn in told] == ["Hello", "Hi", "Hi", "No.", "No!x", ""]
    assert [turn.get("reasoning_content") for turn in told] == [None, "a thought", "another", None, None, None]
    assert told[-1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert taught(told, [])[1]["reasoning_content"] == "a thought"
    for wrong in (
        {"role": "user", "content": "Hello", "reasoning_content": "x"},
        {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "assistant", "content": "x", "audio": {"id": "1"}},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    ):
        with pytest.raises(ApiError, match=r"messages\[0\]"):
            check(parse_object, json.dumps({"messages": [wrong]}).encode(), ChatRequest)


def test_the_prompt_is_as_the_request_tells_the_template() -> None:
    tokenizer = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    turn = "{{ bos_token }}{{ m.reasoning_content }}{{ m.content }}{{ eos_token }}"
    end = "{% if add_generation_prompt %}>{% endif %}"
    tokenizer._template = ChatTemplate(f"{{{{ thinking }}}}{{% for m in messages %}}{turn}{{% endfor %}}{end}")

    def prompt(**fields: Any) -> str:
        turns = [{"role": "assistant", "content": "Hi ", "reasoning_content": "r"}]
        asked = check(parse_object, json.dumps({"messages": turns, **fields}).encode(), ChatRequest)
        return tokenizer.decode(chat_prompt(tokenizer, asked)[0], skip_special_tokens=False)

    assert prompt() == "<s>rHi </s>>"
    assert prompt(add_generation_prompt=False) == "<s>rHi </s>"
    assert prompt(continue_final_message=True) == "<s>rHi "
    assert prompt(chat_template_kwargs={"thinking": False}) == "False<s>rHi </s>>"
    asked = check(
        parse_object, json.dumps({**HELLO, "chat_template_kwargs": {"thinking": "</s>"}}).encode(), ChatRequest
    )
    ids, _ = chat_prompt(tokenizer, asked)
    assert ids.count(tokenizer.special_tokens["</s>"]) == 1  # the template's own


def test_text_calls_and_thoughts_of_one_answer_are_one_turn() -> None:
    tokenizer = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    tokenizer._template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}|"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}{{ tools }}"
    )

    def call(name: str) -> dict[str, Any]:
        return {"call_id": f"c{name}", "name": name, "arguments": '{"a": 1}'}

    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        said,
        {"type": "function_call", **call("f")},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "more"}]},
        {"type": "function_call", **call("g")},
        *({"type": "function_call_output", "call_id": f"c{name}", "output": "x"} for name in "fg"),
        {"type": "function_call", **call("f")},
        {"type": "function_call_output", "call_id": "cf", "output": "y"},
        said,
    ]
    calls = {
        name: {"id": f"c{name}", "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}
        for name in "fg"
    }
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [calls["f"], calls["g"]],
            "reasoning_content": "hm\nmore",
        },
        *({"role": "tool", "tool_call_id": f"c{name}", "content": "x"} for name in "fg"),
        {"role": "assistant", "tool_calls": [calls["f"]]},
        {"role": "tool", "tool_call_id": "cf", "content": "y"},
        {"role": "assistant", "content": "I look."},
    ]
    flat = [{"type": "function", "name": name} for name in "fg"]
    asked = check(parse_object, json.dumps({"input": items, "tools": flat}).encode(), ResponseRequest).as_chat()
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    chat = check(parse_object, json.dumps({"messages": turns, "tools": tools}).encode(), ChatRequest)
    assert [for_template(turn) for turn in asked.messages] == [for_template(turn) for turn in chat.messages]
    assert chat_prompt(tokenizer, asked) == chat_prompt(tokenizer, chat)


def test_a_refusal_by_the_engine_names_the_field() -> None:
    assert api_error(RefusedError("logit_bias names token id 9 and the model has ids 0 to 8")).param == "logit_bias"


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponseRequest])
def test_null_is_as_good_as_nothing(kind: Any) -> None:
    body: dict[str, Any] = (
        {**HELLO} if kind is ChatRequest else {"prompt": "a"} if kind is CompletionRequest else {"input": "a"}
    )
    given = {**body, "temperature": None, "frobnicate": None, "stream": True}
    given["stream_options"] = {"include_usage": True, "other": None}
    assert check(parse_object, json.dumps(given).encode(), kind).stream_options.include_usage
    with pytest.raises(ApiError, match="frobnicate"):
        check(parse_object, json.dumps({**given, "frobnicate": False}).encode(), kind)


def test_usual_values_of_other_servers_are_taken() -> None:
    usual = {
        "use_beam_search": False,
        "length_penalty": 1,
        "prompt_logprobs": None,
        "truncate_prompt_tokens": None,
        "spaces_between_special_tokens": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "priority": 0,
    }
    check(parse_object, json.dumps({"prompt": "a", **usual, "length_penalty": 1.0}).encode(), CompletionRequest)
    prediction = {"type": "content", "content": [{"type": "text", "text": "Hello"}]}
    asked = {**HELLO, **usual, "prediction": prediction, "echo": False, "add_special_tokens": False}
    assert check(parse_object, json.dumps(asked).encode(), ChatRequest).priority == 0


def test_some_of_the_tools_are_allowed() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"]
    fields: dict[str, Any] = {**HELLO, "tools": tools, "tool_choice": allowed("h", "f", mode="required")}
    asked = check(parse_object, json.dumps(fields).encode(), ChatRequest)
    assert [tool.function.name for tool in asked.offered] == ["f", "g", "h"]  # the prompt stays the same
    assert [tool.function.name for tool in asked.callable_tools] == ["f", "h"]
    assert asked.must_call
    flat = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}
    given = {"input": "a", "tools": [{"type": "function", "name": name} for name in "fgh"], "tool_choice": flat}
    other = check(parse_object, json.dumps(given).encode(), ResponseRequest).as_chat()
    assert [tool.function.name for tool in other.callable_tools] == ["g"]
    assert not other.must_call


def test_results_of_calls_before_them_are_taken() -> None:
    call = {"id": "c9", "type": "function", "function": {"name": "f", "arguments": "not JSON"}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "Hurry"}, ANSWERED, ANSWERED]
    check(parse_object, json.dumps({"messages": turns}).encode(), ChatRequest)
    with pytest.raises(ApiError, match="c9"):
        check(parse_object, json.dumps({"messages": turns[2:] + turns[:2]}).encode(), ChatRequest)


def test_names_of_special_tokens_in_a_prompt_are_text_unless_asked_otherwise() -> None:
    tokenizer = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))
    engine = SimpleNamespace(runner=SimpleNamespace(vocab_size=tokenizer.vocab_size))
    service: Any = SimpleNamespace(
        tokenizer=tokenizer,
        background=SimpleNamespace(engine=engine),
        text_bound=TextBound(None, False),
        check_length=lambda *_: None,
    )

    def ids(**fields: Any) -> list[int]:
        asked = check(parse_object, json.dumps({"prompt": "<s>hi</s>", **fields}).encode(), CompletionRequest)
        [prompt] = prompts_of(service, asked)
        return prompt.ids

    bos, eos = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"]
    plain = ids()
    assert (plain[0], plain.count(bos), plain.count(eos)) == (bos, 1, 0)
    assert ids(add_special_tokens=False) == plain[1:]
    parsed = ids(parse_special=True, add_special_tokens=False)
    assert (parsed[0], parsed[-1], parsed.count(bos)) == (bos, eos, 1)
