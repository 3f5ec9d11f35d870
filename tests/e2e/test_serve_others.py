"""The routes beside chat and completions: the seed's chat, responses, embeddings; adapters as models."""

from __future__ import annotations

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

import arriero
from arriero.adapters.lora import adapter_state, apply_lora, load_adapter_state, merge_lora
from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.peft_config import to_peft
from arriero.config.model import ModelOptions
from arriero.engine.engine import Engine
from arriero.engine.loading import LoadedModel, load
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.formats.peft import save_adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served


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


def alone(loaded: LoadedModel, messages: list[dict[str, str]], tokens: int) -> str:
    engine = Engine(TorchRunner(loaded.model, max_tokens=2048), loaded.tokenizer)
    text: str = engine.generate([loaded.tokenizer.chat(messages)], SamplingParams(max_new_tokens=tokens))[0].text
    return text


# The seed's /api/chat


def test_the_seeds_request_gets_the_seeds_answer(served: Served, loaded: LoadedModel) -> None:
    body = {"context": "你好", "max_length": 6, "min_length": 1, "top_p": 0.7, "temperature": 0.0, "extra_info": "x"}
    answer = httpx.post(f"{served.url}/api/chat", json=body)
    text = alone(loaded, [{"role": "user", "content": "你好"}], 6)
    assert answer.json() == {
        "error_code": 0,
        "error_msg": "Success",
        "result": {"response": {"role": "bot", "utterance": text}},
    }


@pytest.mark.parametrize(
    "history",
    [
        ["a question", "an answer"],
        '["a question", "an answer"]',
        [{"role": "user", "utterance": "a question"}, {"role": "bot", "utterance": "an answer"}],
        '[{"role": "user", "utterance": "a question"}, {"role": "bot", "utterance": "an answer"}]',
    ],
)
def test_with_a_history_it_comes_in_lines(served: Served, loaded: LoadedModel, history: Any) -> None:
    body = {"context": "and now?", "history": history, "max_length": 8, "top_p": 0.0, "temperature": 0.9, "top_k": 0}
    answer = httpx.post(f"{served.url}/api/chat", json=body)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    turns = [("user", "a question"), ("assistant", "an answer"), ("user", "and now?")]
    text = alone(loaded, [{"role": role, "content": content} for role, content in turns], 8)
    assert "".join(line["result"]["response"]["utterance"] for line in lines) == text
    assert {(line["error_code"], line["error_msg"]) for line in lines} == {(0, "Success")}
    listed = httpx.post(
        f"{served.url}/api/chat",
        json={"context": ["a question", "an answer", "and now?"], "max_length": 8, "temperature": 0},
    )
    assert listed.json()["result"]["response"]["utterance"] == text


def test_the_seeds_errors(served: Served) -> None:
    def ask(**body: Any) -> tuple[int, str]:
        answer = httpx.post(f"{served.url}/api/chat", json=body).json()
        assert answer["result"] is None
        return answer["error_code"], answer["error_msg"]

    assert ask(context="x", src_length=1500, max_length=1000) == (
        1,
        "The sum of src_length<1500> and max_length<1000> should be smaller than or equal to the max-total-length<2048>",
    )
    assert ask(context="x " * 100, src_length=10, max_length=5)[0] == 1
    assert ask(context="x", max_length=5000)[0] == 1
    code, message = ask(max_length=5)
    assert (code, message[:14]) == (1000, "Server error: ")
    assert ask(context="x", history=["odd"])[0] == 1000
    assert ask(context="x", history="no json")[0] == 1000
    assert ask(context="x", history='[{"role": "king", "utterance": "x"}]')[0] == 1000


# /v1/responses


def test_responses_are_the_chat_in_another_form(client: openai.OpenAI, loaded: LoadedModel) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    wanted = alone(loaded, turns, 8)
    common: Any = {
        "model": "tiny",
        "instructions": "Be brief.",
        "input": "Hello",
        "max_output_tokens": 8,
        "temperature": 0,
    }
    answer = client.responses.create(**common)
    assert answer.output_text == wanted
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8
    listed: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    other = client.responses.create(model="tiny", input=listed, max_output_tokens=8, temperature=0)
    assert other.output_text == wanted
    events = list(client.responses.create(**common, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_responses_parse(client: openai.OpenAI) -> None:
    class Choice(pydantic.BaseModel):
        yes: bool

    asked: Any = {"model": "tiny", "input": "Well?", "max_output_tokens": 300, "text_format": Choice}
    answer = client.responses.parse(**asked)
    assert isinstance(answer.output_parsed, Choice)
    assert answer.status == "completed"
    with client.responses.stream(**asked) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Choice)


def test_responses_call_functions(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "name": "f", "parameters": parameters, "strict": True}]
    asked: Any = {"model": "tiny", "input": "go", "tools": tools, "tool_choice": "required", "max_output_tokens": 200}
    answer = client.responses.create(**asked, parallel_tool_calls=False)
    [call] = answer.output
    assert call.type == "function_call"
    assert call.name == "f"
    assert json.loads(call.arguments).keys() == {"x"}
    events = list(client.responses.create(**asked, stream=True, parallel_tool_calls=False))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done.arguments
    history: Any = [
        {"role": "user", "content": "go"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    later = client.responses.create(model="tiny", input=history, tools=tools, max_output_tokens=4)
    assert later.status == "incomplete"


@pytest.mark.parametrize("cut", [1, 5, 12, 20, 26, 40])
def test_a_call_that_is_cut_shows_no_markup(served: Served, cut: int) -> None:
    hello = [{"role": "user", "content": "Hello there"}]
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    body = {"messages": hello, "tools": [tool], "tool_choice": "required", "max_tokens": cut, "seed": 1}
    [choice] = httpx.post(f"{served.api}/chat/completions", json=body).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)
    calls = choice["message"].get("tool_calls", [])
    assert [call["function"]["name"] for call in calls] == ["weather"] * (cut > 20)
    events = httpx.post(f"{served.api}/chat/completions", json={**body, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert not any(delta.get("content") for delta in deltas)
    streamed = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(one["arguments"] for one in streamed) == "".join(call["function"]["arguments"] for call in calls)
    assert [one["name"] for one in streamed if "name" in one] == ["weather"] * len(calls)
    flat = {"type": "function", "name": "weather", "parameters": parameters}
    asked = {"input": "Hello there", "tools": [flat], "tool_choice": "required", "max_output_tokens": cut}
    response = httpx.post(f"{served.api}/responses", json=asked).json()
    assert response["status"] == "incomplete"
    assert [item["type"] for item in response["output"]] == ["function_call"] * (cut > 20)


def test_responses_tell_log_probabilities(client: openai.OpenAI) -> None:
    """Those that the chat tells, in the parts of the message and with each piece."""
    asked: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 6, "temperature": 0}
    wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    chat: Any = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = [one.model_dump() for one in chat.choices[0].logprobs.content]
    answer: Any = client.responses.create(**asked, **wanted)
    assert answer.top_logprobs == 2

    def same(found: Any) -> None:
        assert [(one["token"], one["bytes"]) for one in found] == [(one["token"], one["bytes"]) for one in content]
        values = [value["logprob"] for one in content for value in (one, *one["top_logprobs"])]
        assert [v["logprob"] for one in found for v in (one, *one["top_logprobs"])] == pytest.approx(values, abs=1e-4)

    same([one.model_dump() for one in answer.output[0].content[0].logprobs])
    events: Any = list(client.responses.create(**asked, **wanted, stream=True))
    same(
        [one.model_dump() for e in events if e.type == "response.output_text.delta" for one in e.logprobs],
    )
    [done] = [event for event in events if event.type == "response.output_text.done"]
    same([one.model_dump() for one in done.logprobs])
    same([one.model_dump() for one in events[-1].response.output[0].content[0].logprobs])
    replayed = [
        {"role": "user", "content": "Hello"},
        answer.output[0].model_dump(),
        {"role": "user", "content": "And?"},
    ]
    assert client.responses.create(**{**asked, "input": replayed}).status == "incomplete"
    without: Any = client.responses.create(**asked, include=["reasoning.encrypted_content"])
    assert without.output[0].content[0].logprobs == []


def test_errors_of_responses_name_their_own_fields(served: Served) -> None:
    for asked, field in (
        ({"input": "Hello", "max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "Hello " * 5000}, "input"),
    ):
        answer = httpx.post(f"{served.api}/responses", json=asked)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_responses_keep_nothing(client: openai.OpenAI) -> None:
    for field in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "c"}):
        asked: Any = {"model": "tiny", "input": "x", **field}
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**asked)


# Beside the model


def test_health_and_version_are_where_others_have_them(served: Served) -> None:
    for path in ("/health", "/ping", "/health/ready"):
        answer = httpx.get(served.url + path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    assert httpx.get(f"{served.url}/version").json() == {"version": arriero.__version__}


# /v1/embeddings


def test_embeddings_are_pooled_hidden_states(client: openai.OpenAI, served: Served, loaded: LoadedModel) -> None:
    texts = ["To be or not", "Romeo"]
    ids = [loaded.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    hidden = [loaded.model.hidden_states(torch.tensor([one])).detach()[0] for one in ids]
    for given in (texts, ids):
        asked: Any = given
        answer = client.embeddings.create(model="tiny", input=asked)  # the client asks for base64
        for found, states in zip(answer.data, hidden, strict=True):
            wanted = states.mean(0) / states.mean(0).norm()
            assert found.embedding == pytest.approx(wanted.tolist(), abs=1e-5)
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    body = {"model": "tiny", "input": "Romeo", "pooling": "last", "encoding_format": "float"}
    last = httpx.post(f"{served.api}/embeddings", json=body).json()["data"][0]["embedding"]
    assert last == pytest.approx((hidden[1][-1] / hidden[1][-1].norm()).tolist(), abs=1e-5)


def test_embeddings_take_as_many_texts_as_openais(served: Served, client: openai.OpenAI) -> None:
    """More than there are places for answers; and what is too much is named."""
    asked = [[5, number % 2000] for number in range(2048)]
    answer = client.embeddings.create(model="tiny", input=asked)
    assert [one.index for one in answer.data] == list(range(2048))
    assert answer.data[7].embedding == client.embeddings.create(model="tiny", input=asked[7]).data[0].embedding
    for body, message, code in (
        ({"input": ["x"] * 3000}, "Invalid 'input': it has 3000 texts: at most 2048 are taken", "invalid_value"),
        ({"input": [[1], [2048]]}, "input[1] holds token id 2048, and the model has ids 0 to 2047", None),
        (
            {"input": [[5] * 2047] * 147},
            "input has 300909 tokens in 147 texts: at most 300000 are taken in one request",
            "too_many",
        ),
        ({"input": [[1], [1] * 2049]}, "input[1] has 2049 tokens: at most 2048", "context_length_exceeded"),
        ({"input": "x " * 3000}, "input has ", "context_length_exceeded"),
    ):
        told = httpx.post(f"{served.api}/embeddings", json=body)
        error = told.json()["error"]
        assert (told.status_code, error["param"], error["code"]) == (400, "input", code), error
        assert error["message"].startswith(message), error


# Adapters


def adapted_alone(folder: Path, messages: list[dict[str, str]], seed: int = 0) -> str:
    """Write a random adapter; what a model answers into which it is merged."""
    adapted = load(ModelOptions(model_name_or_path=TINY, device="cpu"), dtype="float32")
    config = LoRAConfig(rank=4, alpha=64.0, target_modules=("q_proj", "v_proj"))
    apply_lora(adapted.model, config)
    state = adapter_state(adapted.model)
    for name, tensor in state.items():
        torch.nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(len(name) + seed))
    load_adapter_state(adapted.model, state)
    save_adapter(folder, state, to_peft(config, "base"))
    merge_lora(adapted.model)
    return alone(adapted, messages, 8)


def test_adapters_are_models(loaded: LoadedModel, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    texts = {"base": alone(loaded, messages, 8), "team/mine": adapted_alone(tmp_path / "mine", messages)}
    assert texts["base"] != texts["team/mine"]
    with (
        Served("--served_model_name", "base", "--adapters", f"team/mine={tmp_path / 'mine'}") as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list().data] == ["base", "team/mine"]
        assert client.models.retrieve("team/mine").model_dump()["parent"] == "base"
        asked: Any = messages
        for name, text in texts.items():
            answer = client.chat.completions.create(model=name, messages=asked, max_tokens=8, temperature=0)
            assert (answer.model, answer.choices[0].message.content) == (name, text)


def test_adapters_come_and_go(loaded: LoadedModel, tmp_path: Path) -> None:
    """As a client of vLLM asks for them; only from the folder that the server was given."""
    messages: Any = [{"role": "user", "content": "Hello"}]
    root, outside = tmp_path / "adapters", tmp_path / "outside"
    texts = {
        name: adapted_alone(folder, messages, seed)
        for name, folder, seed in (("one", root / "a/one", 0), ("two", root / "two", 40), ("out", outside, 80))
    }
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken/adapter_config.json").write_text("{")
    assert len({alone(loaded, messages, 8), *texts.values()}) == 4
    with (
        Served(
            "--served_model_name",
            "base",
            "--adapter_folder",
            str(root),
            "--max_loaded_adapters",
            "1",
            "--adapters",
            f"kept={outside}",
        ) as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
    ):

        def asked(name: str) -> str | None:
            answer = client.chat.completions.create(model=name, messages=messages, max_tokens=8, temperature=0)
            return answer.choices[0].message.content

        def told(door: str, **body: Any) -> tuple[int, str]:
            answer = httpx.post(f"{served.api}/{door}", json=body, timeout=60)
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        def load_told(name: str, path: str, **more: Any) -> tuple[int, str]:
            return told("load_lora_adapter", lora_name=name, lora_path=path, **more)

        card = httpx.post(
            f"{served.api}/load_lora_adapter", json={"lora_name": "mine", "lora_path": "a/one"}, timeout=60
        )
        assert (card.json()["id"], card.json()["parent"]) == ("mine", "base")
        assert load_told("team/two", str(root / "two")) == (200, "")
        assert [model.id for model in client.models.list().data] == ["base", "kept", "mine", "team/two"]
        assert [asked(name) for name in ("mine", "team/two", "mine")] == [texts["one"], texts["two"], texts["one"]]

        status, message = load_told("mine", "two")
        assert (status, "loaded already" in message) == (400, True)
        assert load_told("mine", "two", load_inplace=True) == (200, "")
        assert asked("mine") == texts["two"]

        assert told("unload_lora_adapter", lora_name="mine") == (200, "")
        with pytest.raises(openai.NotFoundError):
            asked("mine")
        assert told("unload_lora_adapter", lora_name="mine")[0] == 404
        assert told("unload_lora_adapter", lora_name="base")[0] == 400
        assert told("unload_lora_adapter", lora_name="kept")[0] == 400
        assert load_told("kept", "two", load_inplace=True)[0] == 400
        assert asked("kept") == texts["out"]
        assert load_told("mine", "a/one") == (200, "")
        assert asked("mine") == texts["one"]

        for path in (
            "../outside",
            str(outside),
            "link",
            "loop",
            "nowhere",
            ".",
            "",
            "a/../..",
            "x\0y",
            "y" * 300,
            "/etc",
        ):
            status, message = load_told("other", path)
            assert status == 400
            assert not path or "no such folder in the server's --adapter_folder" in message
        for path, reason in (("empty", "adapter_config.json"), ("broken", "broken/adapter_config.json")):
            status, message = load_told("other", path)
            assert status == 400
            assert reason in message
            assert str(tmp_path) not in message
        assert load_told("base", "two")[0] == load_told("../x", "two")[0] == 400
        wrong_name = httpx.post(
            f"{served.api}/load_lora_adapter", json={"lora_name": "../x", "lora_path": "two"}, timeout=60
        )
        assert wrong_name.json()["error"]["param"] == "lora_name"
        assert told("load_lora_adapter", lora_name="other")[0] == 400
        assert [model.id for model in client.models.list().data] == ["base", "kept", "team/two", "mine"]
        assert 'arriero_generated_tokens_total{model="mine"} 8.0' in httpx.get(f"{served.url}/metrics").text
        assert told("unload_lora_adapter", lora_name="mine") == (200, "")
        assert 'model="mine"' not in httpx.get(f"{served.url}/metrics").text
        assert asked("base") == alone(loaded, messages, 8)
    assert [line["event"] for line in served.log if "adapter" in line["event"]] == [
        "adapter_loaded", "adapter_loaded", "adapter_loaded", "adapter_unloaded", "adapter_loaded", "adapter_unloaded",
    ]  # fmt: skip


def test_no_adapter_comes_unless_the_server_is_told_a_folder(tmp_path: Path) -> None:
    with Served() as served:
        for door in ("load_lora_adapter", "unload_lora_adapter"):
            assert httpx.post(f"{served.api}/{door}", json={"lora_name": "a", "lora_path": "b"}).status_code == 404


# Bundles


def test_a_bundle_is_served_too(in_process: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    """In fp32 its greedy answers are those of the checkpoint."""
    pytest.importorskip("onnxruntime")
    made = in_process("export", "--model_path", TINY, "--output_path", str(tmp_path / "tiny"), "--kind", "onnx")
    assert made.returncode == 0, made.stderr
    messages: Any = [{"role": "user", "content": "Hello"}]
    with (
        Served("--max_batch_size", "4", model=str(tmp_path / "tiny")) as served,
        openai.OpenAI(base_url=served.api, api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content == alone(loaded, messages, 8)
        with pytest.raises(openai.BadRequestError, match="no embeddings"):
            client.embeddings.create(model="tiny", input="x")
