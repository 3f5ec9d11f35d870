"""Conversations of a real server: their prompts are those that /tokenize tells, and stop strings are of what is said."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

from arriero.formats.download import resolve_model

HELLO: Any = [{"role": "user", "content": "Hello there"}]
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": NOTHING}}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
CALLED: Any = [
    *HELLO,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    {"role": "user", "content": "And now?"},
]
# As Hermes': a plain template, and one named `tool_use` that writes calls itself.
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
NAMED = [
    {"name": "default", "template": TURNS},
    {"name": "tool_use", "template": "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}" + TURNS},
]


@pytest.fixture(scope="module", params=["taught", "named"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = TINY
    if request.param == "named":
        folder = tmp_path_factory.mktemp("models") / "named"
        shutil.copytree(resolve_model(TINY), folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": NAMED}), encoding="utf-8")
        model = str(folder)
    with Served(model=model) as server:
        yield server


def ask(served: Served, **body: Any) -> Any:
    answer = httpx.post(f"{served.api}/chat/completions", json={"messages": HELLO, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HELLO},
        {"messages": HELLO, "tools": [TOOL]},
        {"messages": HELLO, "tools": [TOOL], "tool_choice": "none"},
        {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "now"}}},
        {"messages": CALLED},
        {"messages": CALLED, "tools": [TOOL], "add_generation_prompt": True},
    ],
)
def test_tokenize_tells_the_prompt_of_a_conversation(served: Served, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{served.url}/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["count"] == ask(served, **body, max_tokens=1)["usage"]["prompt_tokens"]
    if body.get("tools"):
        told = httpx.post(f"{served.url}/detokenize", json={"tokens": answer.json()["tokens"]}).json()["prompt"]
        assert ("The time." in told) == (body.get("tool_choice") != "none")


def test_tokenize_refuses_what_a_conversation_would_be_refused_for(served: Served) -> None:
    answer = httpx.post(f"{served.url}/tokenize", json={"messages": HELLO, "tool_choice": "required"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize("stop", ["\n", "</tool_call>", "name"])
def test_a_call_that_must_come_is_not_stopped(served: Served, stop: str) -> None:
    body = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "stop": [stop], "seed": 1}
    [choice] = ask(served, **body, max_tokens=200)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}


def test_log_probabilities_end_before_a_stop_string(served: Served) -> None:
    settings = {"temperature": 0, "max_tokens": 12, "logprobs": True}
    text = ask(served, **settings)["choices"][0]["message"]["content"]
    stop = text[5:12]
    [choice] = ask(served, **settings, stop=stop)["choices"]
    said = choice["message"]["content"]
    assert (choice["finish_reason"], said) == ("stop", text[: text.index(stop)])
    tokens = [bytes(one["bytes"]) for one in choice["logprobs"]["content"]]
    whole, before_last = (b"".join(some).decode("utf-8", "replace") for some in (tokens, tokens[:-1]))
    assert whole.startswith(said)
    assert len(before_last) < len(said)  # so the last one begins in what is said
