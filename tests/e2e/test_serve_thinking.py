"""A model that thinks, served: its thought apart from its answer, in every form that clients know. The model is random; what it
thinks ends where a bias makes the mark of the end likely."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import Served

from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA

OPENING, CLOSING = 2046, 2047  # ids of the marks, one token each as in Qwen3 and DeepSeek-R1
# As Qwen3's: thoughts of earlier turns are left out, and enable_thinking false puts an empty one into the prompt; and as
# DeepSeek-R1's where `opens` is true, whose prompts begin the thought.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set text = m.content.split('</think>')[-1] %}{{ m.role + ': ' + text + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% if opens %}{{ '<think>\n' }}"
    "{% elif enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
HELLO: Any = [{"role": "user", "content": "Hello there"}]
OPENS = {"chat_template_kwargs": {"opens": True}}
ENDS: Any = {str(CLOSING): 5.0}  # the mark is then one token of about fifteen
TOOL: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "thinker"
    shutil.copytree(resolve_model(TINY_RANDOM_LLAMA), folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    gone = {token for token, index in data["model"]["vocab"].items() if index >= OPENING}
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if token not in gone}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]]
    data["model"]["merges"] = [pair for pair in pairs if not gone & {*pair, "".join(pair)}]
    mark = {**data["added_tokens"][0], "special": False}
    data["added_tokens"] += [
        {**mark, "id": OPENING, "content": "<think>"},
        {**mark, "id": CLOSING, "content": "</think>"},
    ]
    path.write_text(json.dumps(data), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(thinker: Path) -> Iterator[Served]:
    with Served(model=str(thinker)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"max_tokens": 120, "seed": 3, "logit_bias": ENDS, "extra_body": OPENS, **options}
    return client.chat.completions.create(model="thinker", messages=HELLO, **settings)


def raw(choice: Any) -> str:
    """All that the model wrote, by its tokens."""
    return b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode("utf-8", "replace")


def test_a_thought_that_the_prompt_begins(client: openai.OpenAI) -> None:
    found = ask(client, logprobs=True, stop=["</think>"])
    choice = found.choices[0]
    assert choice.message.content is None
    assert choice.message.reasoning_content
    assert choice.message.reasoning_content == raw(choice).removesuffix("</think>").strip()
    found = ask(client, logprobs=True)
    message, written = found.choices[0].message, raw(found.choices[0])
    thought, mark, rest = written.partition("</think>")
    assert mark
    assert message.reasoning_content == thought.strip()
    assert message.content == rest.lstrip()
    ids = [one.bytes for one in found.choices[0].logprobs.content]
    details = found.usage.completion_tokens_details
    assert details.reasoning_tokens == ids.index(list(b"</think>")) + 1 < found.usage.completion_tokens


def test_a_stream_of_it(client: openai.OpenAI) -> None:
    whole = ask(client, n=2, seed=4)
    told: dict[int, list[tuple[str, str]]] = {0: [], 1: []}
    usage = None
    for chunk in ask(client, n=2, seed=4, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought = getattr(choice.delta, "reasoning_content", None)
            told[choice.index].append((thought or "", choice.delta.content or ""))
    for choice in whole.choices:
        pieces = told[choice.index]
        assert "".join(thought for thought, _ in pieces) == getattr(choice.message, "reasoning_content", "")
        assert "".join(said for _, said in pieces) == choice.message.content
        first = next(i for i, (_, said) in enumerate(pieces) if said)
        assert not any(thought for thought, _ in pieces[first:])
    assert usage is not None
    assert usage == whole.usage


def test_a_thought_that_the_answer_begins(client: openai.OpenAI) -> None:
    bias = {str(OPENING): 100}
    found = ask(client, extra_body=None, logit_bias=bias, max_tokens=5)
    assert found.choices[0].message.content is None
    assert found.choices[0].message.reasoning_content == "<think>" * 4
    assert found.usage.completion_tokens_details.reasoning_tokens == 5
    plain = ask(client, extra_body=None, max_tokens=8)  # it begins none, and the mark is text as any other
    assert not hasattr(plain.choices[0].message, "reasoning_content")
    none = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}}, logit_bias=bias, max_tokens=3)
    assert none.choices[0].message.content == "<think>" * 3
    assert none.usage.completion_tokens_details.reasoning_tokens == 0


def test_forms_and_tools_come_after_it(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}}}
    found = ask(client, response_format=form, max_tokens=400)
    assert found.choices[0].message.reasoning_content
    if found.choices[0].finish_reason == "stop":
        assert list(json.loads(found.choices[0].message.content)) == ["a"]
    found = ask(client, extra_body={**OPENS, "structured_outputs": {"choice": ["yes", "no"]}})
    assert found.choices[0].message.reasoning_content
    assert found.choices[0].message.content in ("yes", "no")
    found = ask(client, tools=[TOOL], tool_choice="required", max_tokens=400)
    assert found.choices[0].message.reasoning_content
    calls = found.choices[0].message.tool_calls
    assert calls[0].function.name == "now"
    found = ask(client, extra_body={**OPENS, "structured_outputs": {"grammar": 'start: "yes" | "no"'}})
    assert found.choices[0].message.content in ("yes", "no")  # a grammar is the whole answer's


def test_it_is_left_out_where_it_is_not_wanted(client: openai.OpenAI) -> None:
    wanted = ask(client)
    found = ask(client, extra_body={**OPENS, "include_reasoning": False})
    assert not hasattr(found.choices[0].message, "reasoning_content")
    assert found.choices[0].message.content == wanted.choices[0].message.content
    assert found.usage == wanted.usage
    chunks = list(ask(client, extra_body={**OPENS, "include_reasoning": False}, stream=True))
    assert not any(hasattr(choice.delta, "reasoning_content") for chunk in chunks for choice in chunk.choices)


def test_responses(served: Served, client: openai.OpenAI, thinker: Path) -> None:
    """There is no bias in this API: what a random model thinks has no end."""
    settings: Any = {"model": "thinker", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    first = client.responses.create(**settings)
    assert [item.type for item in first.output] == ["message"]
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
    turns = [{"role": "user", "content": "Hello"}, item, *(one.model_dump() for one in first.output)]
    again = client.responses.create(**{**settings, "input": [*turns, {"role": "user", "content": "And?"}]})
    assert again.status in ("completed", "incomplete")


def test_responses_of_a_model_whose_prompts_begin_a_thought(thinker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "opener"
    shutil.copytree(thinker, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE.replace("if opens", "if true")}), encoding="utf-8")
    with Served(model=str(folder)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        settings: Any = {"model": "opener", "input": "Hello", "max_output_tokens": 12, "temperature": 0}
        found = client.responses.create(**settings)
        assert [item.type for item in found.output] == ["reasoning"]
        assert found.status == "incomplete"
        text = found.output[0].content[0].text
        assert text
        assert found.usage.output_tokens_details.reasoning_tokens == found.usage.output_tokens
        kinds, deltas = [], ""
        for event in client.responses.create(**settings, stream=True):
            kinds.append(event.type)
            deltas += event.delta if event.type == "response.reasoning_text.delta" else ""
        assert deltas == text
        assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
        assert kinds[-4:] == [
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        form = {"format": {"type": "json_schema", "name": "a", "schema": {"enum": ["yes"]}}}
        cut = client.responses.create(**settings, text=form)
        assert [item.type for item in cut.output] == ["reasoning"]  # the thought comes first
        seed = httpx.post(
            f"{server.url}/api/chat", json={"context": "Hello", "max_length": 12, "temperature": 0}, timeout=60
        ).json()
        assert seed["result"]["response"]["utterance"] == "invalid response"  # nothing was said yet
    with Served("--reasoning_format", "none", model=str(folder)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        plain = client.responses.create(**settings, reasoning={"effort": "low"})
        assert [item.type for item in plain.output] == ["message"]
        assert plain.output_text.strip() == text
        assert plain.usage.output_tokens_details.reasoning_tokens == 0
