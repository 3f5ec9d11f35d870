"""OpenAI's own client against a real server; what it gets is held against the engine alone."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import torch

from arriero.config.model import ModelOptions
from arriero.engine.engine import Engine
from arriero.engine.loading import LoadedModel, load
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

BAD: Any = {"name": "thing", "schema": {"type": "object", "properties": {"a": {"type": "nothing"}}}}
HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served("--served_model_name", "tiny") as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(ModelOptions(model_name_or_path=TINY, device="cpu"), dtype="float32")


def alone(loaded: LoadedModel, prompt: list[int], **params: Any) -> Any:
    """The answer of an engine that has nothing else to do."""
    engine = Engine(TorchRunner(loaded.model, max_tokens=2048), loaded.tokenizer)
    return engine.generate([prompt], SamplingParams(**params))[0]


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}])
def test_a_chat_answer_is_that_of_the_engine_alone(
    client: openai.OpenAI, loaded: LoadedModel, drawn: dict[str, Any]
) -> None:
    prompt = loaded.tokenizer.chat(HELLO)
    sampled = {**drawn, "do_sample": drawn["temperature"] > 0}
    wanted = alone(loaded, prompt, max_new_tokens=12, **sampled)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=12, **drawn)
    choice = answer.choices[0]
    assert choice.message.content == wanted.text
    assert (choice.finish_reason, choice.index, choice.message.role) == ("length", 0, "assistant")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    pieces = list(
        client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=12, stream=True, **drawn)
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted.text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len({piece.id for piece in pieces}) == 1


def test_a_stream_is_what_the_protocol_says(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{served.api}/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    without = httpx.post(f"{served.api}/chat/completions", json={**body, "stream_options": None}).text
    assert "usage" not in without


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI, loaded: LoadedModel) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, n=3, seed=7)
    texts = [choice.message.content for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    prompt = loaded.tokenizer.chat(HELLO)
    assert texts == [alone(loaded, prompt, max_new_tokens=6, do_sample=True, seed=7 + i).text for i in range(3)]
    streamed = ["", "", ""]
    for piece in client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, n=3, seed=7, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_bias_and_penalties_reach_the_engine(client: openai.OpenAI, loaded: LoadedModel) -> None:
    prompt = loaded.tokenizer.encode("To be or not", add_special_tokens=True)
    wanted = alone(loaded, prompt, max_new_tokens=12)
    stop = wanted.text[4:7]
    stopped = client.completions.create(model="tiny", prompt="To be or not", max_tokens=12, temperature=0, stop=stop)
    assert stopped.choices[0].text == wanted.text[: wanted.text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    token = wanted.token_ids[0]
    biased = client.completions.create(
        model="tiny", prompt="To be or not", max_tokens=4, temperature=0, logit_bias={str(token): -100}
    )
    assert biased.choices[0].text == alone(loaded, prompt, max_new_tokens=4, logit_bias={token: -100.0}).text
    assert not biased.choices[0].text.startswith(loaded.tokenizer.decode([token]))
    sure = client.completions.create(
        model="tiny", prompt="To be or not", max_tokens=4, logit_bias={"300": 100}, presence_penalty=0, seed=3
    )
    assert sure.choices[0].text == loaded.tokenizer.decode([300]) * 4


def test_completions_take_token_ids_and_many_prompts(client: openai.OpenAI, loaded: LoadedModel) -> None:
    texts = ["To be", "What is", "O Romeo"]
    ids = [loaded.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    wanted = [alone(loaded, prompt, max_new_tokens=5).text for prompt in ids]
    for prompts in (texts, ids):
        given: Any = prompts
        answer = client.completions.create(model="tiny", prompt=given, max_tokens=5, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    streamed = [""] * 3
    for piece in client.completions.create(model="tiny", prompt=texts, max_tokens=5, temperature=0, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == wanted


def test_echo_gives_the_prompts_log_probabilities(client: openai.OpenAI, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("The quality of mercy", add_special_tokens=True)
    logits = loaded.model(torch.tensor([ids])).detach()[0].log_softmax(-1)
    wanted = [None, *(float(logits[i, token]) for i, token in enumerate(ids[1:]))]
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2, temperature=0)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert found.choices[0].text == "The quality of mercy"
    assert logprobs.top_logprobs is not None
    assert max(logprobs.top_logprobs[1].values()) == pytest.approx(float(logits[0].max()), abs=1e-4)
    assert logprobs.text_offset is not None
    assert [loaded.tokenizer.decode([token]) for token in ids[1:]] == [
        "The quality of mercy"[start:end]
        for start, end in zip(logprobs.text_offset[1:], [*logprobs.text_offset[2:], None], strict=True)
    ]
    pieces = list(
        client.completions.create(
            model="tiny", prompt=ids, max_tokens=2, echo=True, logprobs=0, temperature=0, stream=True
        )
    )
    whole = client.completions.create(model="tiny", prompt=ids, max_tokens=2, echo=True, logprobs=0, temperature=0)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    streamed = [value for piece in pieces for value in piece.choices[0].logprobs.token_logprobs]  # type: ignore[union-attr]
    assert whole.choices[0].logprobs is not None
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_lie_in_the_text(served: Served, loaded: LoadedModel, stream: bool) -> None:
    """Also where characters are spread over several tokens."""
    prompt = "naïve 東京 in the evening 🙂"
    body = {"prompt": prompt, "max_tokens": 6, "echo": True, "logprobs": 0, "seed": 1, "stream": stream}
    answer = httpx.post(f"{served.api}/completions", json=body)
    lines = answer.text.split("\n\n")[:-2]
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines] if stream else [answer.json()]
    choices = [piece["choices"][0] for piece in pieces]
    text = "".join(choice["text"] for choice in choices)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for one in told for token in one["tokens"]]
    offsets = [offset for one in told for offset in one["text_offset"]]
    ids = loaded.tokenizer.encode(prompt, add_special_tokens=True)
    assert (len(offsets), offsets[0], offsets[len(ids)]) == (len(ids) + 6, 0, len(prompt))
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    for token, start, end in zip(tokens[1:], offsets[1:], [*offsets[2:], len(text)], strict=True):
        if not token.startswith("bytes:"):
            assert text[start:end] == token
    assert [offset for token, offset in zip(tokens, offsets, strict=True) if token == "bytes:\\xac"] == [
        prompt.index("京")
    ]


def test_usage_is_what_was_generated(served: Served) -> None:
    def completion_tokens(**fields: Any) -> int:
        body = {"prompt": "To be", "ignore_eos": True, **fields}
        count: int = httpx.post(f"{served.api}/completions", json=body).json()["usage"]["completion_tokens"]
        return count

    assert completion_tokens(max_tokens=0, echo=True) == 0
    assert completion_tokens(max_tokens=0, echo=True, prompt=["a", "b"], n=2) == 0
    assert completion_tokens(max_tokens=5, best_of=4, n=1) == 20
    assert completion_tokens(max_tokens=5, best_of=4, n=2, prompt=["a", "b"]) == 40
    assert completion_tokens(max_tokens=5, n=2) == 10


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content or []
    assert (
        b"".join(bytes(one.bytes or []) for one in content).decode("utf-8", "replace")
        == whole.choices[0].message.content
    )
    assert all(one.logprob == pytest.approx(one.top_logprobs[0].logprob) for one in content)  # greedy
    assert all(len(one.top_logprobs) == 2 for one in content)
    pieces = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    found = [piece.choices[0].logprobs for piece in pieces]
    streamed = [one.token for logprobs in found if logprobs for one in logprobs.content or ()]
    assert streamed == [one.token for one in content]


def test_json_schemas_are_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["S", "M"]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=200, seed=seed, response_format=form
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert value.keys() == {"ok", "size"}
        assert isinstance(value["ok"], bool)
        assert value["size"] in ("S", "M")
        assert answer.choices[0].finish_reason == "stop"


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    class Choice(pydantic.BaseModel):
        yes: bool

    answer = client.chat.completions.parse(model="tiny", messages=HELLO, max_tokens=200, seed=1, response_format=Choice)
    assert isinstance(answer.choices[0].message.parsed, Choice)


def test_tools_get_arguments_that_fit(client: openai.OpenAI) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "A test.",
                "parameters": {
                    "type": "object",
                    "properties": {"way": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
                    "required": ["way", "far"],
                    "additionalProperties": False,
                },
            },
        }
        for name in ("walk", "run")
    ]
    common: Any = {"model": "tiny", "messages": HELLO, "tools": tools, "max_tokens": 300, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**common, tool_choice="required", seed=1)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    [call] = message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in ("walk", "run")
    arguments = json.loads(call.function.arguments)
    assert arguments["way"] in ("north", "south")
    assert isinstance(arguments["far"], bool)

    named: Any = {"type": "function", "function": {"name": "run"}}
    found, text = "", ""
    for piece in client.chat.completions.create(**common, tool_choice=named, seed=2, stream=True):
        for delta in piece.choices[0].delta.tool_calls or ():
            assert delta.function is not None
            found += delta.function.name or ""
            text += delta.function.arguments or ""
        finish = piece.choices[0].finish_reason
    assert (found, finish) == ("run", "tool_calls")
    assert json.loads(text).keys() == {"way", "far"}

    none = client.chat.completions.create(**{**common, "max_tokens": 5}, tool_choice="none", seed=1)
    assert none.choices[0].message.tool_calls is None
    history: Any = [*HELLO, {"role": "assistant", "tool_calls": [call.model_dump()]}]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    later = client.chat.completions.create(model="tiny", messages=history, tools=tools, max_tokens=5)
    assert later.choices[0].finish_reason in ("length", "stop")


def test_forms_in_vllms_words_are_kept(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 20, "structured_outputs": {"choice": ["north", "south"]}}
    [choice] = httpx.post(f"{served.api}/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"] in ("north", "south")
    plain = {"prompt": "To be", "max_tokens": 20, "guided_regex": "[ab]{3}"}
    [choice] = httpx.post(f"{served.api}/completions", json=plain).json()["choices"]
    assert len(choice["text"]) == 3
    assert set(choice["text"]) <= {"a", "b"}
    assert choice["finish_reason"] == "stop"


def test_many_at_once_get_their_own_answers(served: Served, loaded: LoadedModel) -> None:
    prompts = [f"Number {i} says" for i in range(24)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.api, api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([piece.choices[0].text async for piece in stream])

            return await asyncio.gather(*map(one, prompts))

    ids = [loaded.tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    assert asyncio.run(ask()) == [alone(loaded, prompt, max_new_tokens=10).text for prompt in ids]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0]", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {**BAD, "strict": True}}}, "response_format", None),
        ({"guided_regex": "(a"}, "guided_regex", None),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": BAD["schema"], "strict": True}}]},
            "tools[0].function.parameters",
            None,
        ),
    ],
)
def test_errors_are_openais(served: Served, change: dict[str, Any], param: str, code: str | None) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, **change}
    answer = httpx.post(f"{served.api}/chat/completions", json=body)
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    assert answer.headers["x-request-id"]


def test_tokenize_and_back(served: Served, loaded: LoadedModel) -> None:
    found = httpx.post(f"{served.url}/tokenize", json={"prompt": "To be </s>"}).json()
    assert found["tokens"] == loaded.tokenizer.encode("To be </s>", add_special_tokens=True)
    assert found["count"] == len(found["tokens"])
    text = httpx.post(f"{served.url}/detokenize", json={"tokens": found["tokens"][1:]}).json()
    assert text == {"prompt": "To be </s>"}
    chat = httpx.post(f"{served.url}/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == loaded.tokenizer.chat(HELLO)


def test_langchain(served: Served, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """LangChain's chat model: asked, streamed, bound to a tool, and with a form for its answer."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_openai import ChatOpenAI

    class Go(pydantic.BaseModel):
        """Go somewhere."""

        north: bool

    settings: Any = {"base_url": served.api, "api_key": "none", "model": "tiny", "max_retries": 0}
    wanted = alone(loaded, loaded.tokenizer.chat(HELLO), max_new_tokens=8).text
    model = ChatOpenAI(**settings, temperature=0, max_completion_tokens=8)
    answer = model.invoke("Hello there")
    assert answer.content == wanted
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(str(piece.content) for piece in model.stream("Hello there")) == wanted
    longer = ChatOpenAI(**settings, max_completion_tokens=300, seed=1)
    # strict: without it a schema allows other keys too, of which a random model makes ample use
    bound = longer.bind_tools([Go], tool_choice="required", parallel_tool_calls=False, strict=True)
    called = bound.invoke("Where to?")
    [call] = called.tool_calls
    assert (call["name"], call["args"].keys()) == ("Go", {"north"})
    for method in ("json_schema", "function_calling"):
        assert isinstance(longer.with_structured_output(Go, method=method, strict=True).invoke("Where to?"), Go)
