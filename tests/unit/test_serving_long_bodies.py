"""Bodies with very many wrong things: they are refused as quickly as those with one, with one error and not one for each."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from arriero.serving.api_errors import ApiError
from arriero.serving.body import Closed, check
from arriero.serving.openai.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from arriero.serving.openai.response_request import ResponseRequest
from arriero.serving.seed_chat import SeedChatRequest
from arriero.serving.strict_json import parse_object

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
MANY = 3000  # a body of 2 MB holds 900,000; each error takes a microsecond and a kilobyte
TOOL = {"type": "function", "function": {"name": "f"}}
SAID = {"role": "assistant", "tool_calls": [{"id": "c"}] * MANY}
NAMED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}] * MANY}}


def parts(item: Any, role: str = "user") -> dict[str, Any]:
    """A conversation with a message of so many parts."""
    return {"messages": [{"role": role, "content": [item] * MANY}]}


def items(**fields: Any) -> dict[str, Any]:
    """The same of /v1/responses."""
    return {"input": [fields]}


BODIES: list[tuple[type[Closed], dict[str, Any], str]] = [
    *((CompletionRequest, {"prompt": [item] * MANY}, "prompt") for item in (1.5, {}, [{}], "", None, -1)),
    (CompletionRequest, {"prompt": [[1.5] * MANY]}, "prompt"),
    (CompletionRequest, {"prompt": [1] * MANY + [1.5] * MANY}, "prompt"),
    *((DetokenizeRequest, {"tokens": [item] * MANY}, "tokens") for item in (1.5, {}, -1, True)),
    *((ChatRequest, {**HELLO, "stop_token_ids": [item] * MANY}, "stop_token_ids") for item in ({}, 1)),
    *((ChatRequest, {**HELLO, "stop": [item] * MANY}, "stop") for item in ({}, "a", "")),
    (ChatRequest, {**HELLO, "logit_bias": {f"a{i}": 1 for i in range(MANY)}}, "logit_bias"),
    (ChatRequest, {**HELLO, "metadata": {f"a{i}": 1 for i in range(MANY)}}, "metadata"),
    (ChatRequest, {**HELLO, "chat_template_kwargs": {f"_{i}": [] for i in range(MANY)}}, "chat_template_kwargs"),
    (ChatRequest, {"messages": [{}] * MANY}, "messages"),
    (ChatRequest, {"messages": [{"role": "user"}] * MANY}, "messages"),
    *((ChatRequest, parts(item), "messages") for item in ({}, {"type": "text"}, 1)),
    *((ChatRequest, parts(item, "assistant"), "messages") for item in ({}, {"type": "text", "text": 1})),
    (ChatRequest, {"messages": [SAID]}, "messages"),
    *((ChatRequest, {**HELLO, "tools": [item] * MANY}, "tools") for item in ({}, TOOL, {"type": "x"})),
    (ChatRequest, {**HELLO, "tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
    (ChatRequest, {**HELLO, "modalities": ["audio"] * MANY}, "modalities"),
    (ChatRequest, {**HELLO, "guided_choice": [1] * MANY}, "guided_choice"),
    (ChatRequest, {**HELLO, **{f"unknown{i}": 1 for i in range(MANY)}}, "unknown0"),
    (ChatRequest, {"messages": [{"role": "user", **{f"unknown{i}": 1 for i in range(MANY)}}]}, "messages"),
    (TokenizeRequest, {"messages": [{"role": 1}] * MANY}, "messages"),
    (ResponseRequest, {"input": [{}] * MANY}, "input"),
    (ResponseRequest, items(role="user", content=[{}] * MANY), "input"),
    (ResponseRequest, items(type="reasoning", summary=[{}] * MANY), "input"),
    (ResponseRequest, {"input": "a", "tools": [{}] * MANY}, "tools"),
    (ResponseRequest, {"input": "a", "include": ["x"] * MANY}, "include"),
    (SeedChatRequest, {"context": [1] * MANY}, "context"),
    (SeedChatRequest, {"context": "a", "history": [1] * MANY}, "history"),
]


@pytest.mark.parametrize(("kind", "body", "param"), BODIES)
def test_many_wrong_things_are_a_few_errors(kind: type[Closed], body: dict[str, Any], param: str) -> None:
    with pytest.raises(pydantic.ValidationError) as many:
        kind.model_validate(body)
    assert many.value.error_count() <= 12
    with pytest.raises(ApiError) as told:
        check(parse_object, json.dumps(body).encode(), kind)
    assert told.value.status == 400
    assert told.value.param is not None
    assert told.value.param.startswith(param)


def test_what_is_not_wrong_is_still_taken() -> None:
    body = {**HELLO, "logit_bias": {str(i): 1 for i in range(300)}, "stop": ["a"] * 16, "unknown": None}
    asked = check(parse_object, json.dumps(body).encode(), ChatRequest)
    assert len(asked.logit_bias or ()) == 300
    assert check(parse_object, json.dumps({"prompt": [5] * 9000}).encode(), CompletionRequest).prompt == [5] * 9000
