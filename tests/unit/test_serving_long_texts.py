"""Texts that are too long in any case are refused before they are tokenized, and long ones keep nobody waiting."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA
from arriero.serving.admission import Admission
from arriero.serving.api_errors import ApiError
from arriero.serving.event_stream import ClientLeft
from arriero.serving.openai.chat import prepare as prepare_chat
from arriero.serving.openai.completions import prepare as prepare_completion
from arriero.serving.openai.embeddings import _texts
from arriero.serving.openai.models import MAX_TOKENIZED, _token_ids
from arriero.serving.openai.requests import ChatRequest, CompletionRequest, TokenizeRequest
from arriero.serving.seed_chat import SeedChatRequest, SeedError
from arriero.serving.seed_chat import prepare as prepare_seed
from arriero.serving.service import LONG_BODY, Limits, ServedModel, Service
from arriero.serving.text_bound import TextBound
from arriero.serving.workers import LONG_THREADS, Workers

CORPUS = ["the quick brown fox    jumps over\n\n the lazy dog", "éô 한국 naïve aaaaaaaaaaaaaaaa" * 3] * 20


def trained(folder: Path, normalizer: Any) -> Tokenizer:
    """A byte-level tokenizer that changes texts first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|a long name of a special token|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|a long name of a special token|>"}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("nfc"), normalizers.NFC())


# letters with marks, Hangul in parts, musical signs, which NFC makes longer
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé\u0301\u0323\u0345\u1112\u1161\u11ab\U0001d160")
)


@given(text=TEXTS, times=st.integers(1, 40))
def test_no_text_has_fewer_tokens_than_it_is_told_to_have(
    tiny: Tokenizer, composing: Tokenizer, text: str, times: int
) -> None:
    for tokenizer in (tiny, composing):
        bound = TextBound.of(tokenizer) if not hasattr(tokenizer, "_bound") else tokenizer._bound
        vars(tokenizer)["_bound"] = bound
        assert bound.bytes_a_token is not None
        for allow_special in (False, True):
            whole = text * times + "".join(tokenizer.special_tokens) * allow_special
            assert bound.tokens(whole) <= len(tokenizer.encode(whole, allow_special=allow_special))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.StripAccents(),
        normalizers.Replace(tokenizers.Regex(" +"), " "),
        normalizers.BertNormalizer(lowercase=False),
    ],
    ids=lambda one: type(one).__name__,
)
def test_of_a_tokenizer_that_drops_something_nothing_is_told(tmp_path: Path, normalizer: Any) -> None:
    tokenizer = trained(tmp_path, normalizer)
    bound = TextBound.of(tokenizer)
    for text in (" " * 5000, "\u0301" * 5000, "ﷺ" * 5000, "\x01" * 5000):
        assert bound.tokens(text) <= len(tokenizer.encode(text)), normalizer


def service_of(tokenizer: Any, context: int = 64) -> Any:
    """What of a service the preparation of a request needs."""
    service = Service.__new__(Service)
    vars(service).update(
        limits=Limits(context, context, context, 60.0),
        reasoning=False,
        background=SimpleNamespace(
            engine=SimpleNamespace(tokenizer=tokenizer, runner=SimpleNamespace(vocab_size=tokenizer.vocab_size))
        ),
    )
    return service


LONG = "ab" * 5000


def test_what_is_too_long_in_any_case_is_not_tokenized(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(tiny)
    turns: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for prepare, body, param in (
        (prepare_completion, CompletionRequest(prompt=["a", LONG]), "prompt"),
        (prepare_chat, ChatRequest(messages=[*turns, {"role": "user", "content": LONG}]), "messages"),  # type: ignore[list-item]
    ):
        with monkeypatch.context() as unbounded:
            unbounded.setattr(TextBound, "tokens", lambda *_: 0)
            with pytest.raises(ApiError, match=r"longest prompt is 63 tokens here, and yours has \d+:"):
                prepare(service, body)  # type: ignore[operator]
        with monkeypatch.context() as never:  # tokenizes
            never.setattr(Tokenizer, "encode", None)
            never.setattr(Tokenizer, "chat", None)
            with pytest.raises(
                ApiError, match=r"longest prompt is 63 tokens here, and yours has at least \d+:"
            ) as found:
                prepare(service, body)  # type: ignore[operator]
        assert (found.value.status, found.value.code, found.value.param) == (400, "context_length_exceeded", param)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **_: [5] * len(text))
    monkeypatch.setattr(Tokenizer, "chat", None)
    with pytest.raises(SeedError, match="at least") as seed:
        prepare_seed(service, SeedChatRequest(context=LONG))
    assert seed.value.number == 1
    with pytest.raises(ApiError, match=r"input\[1\] has at least \d+ tokens: at most 20 are taken in one text"):
        _texts(service, ["a", LONG], 20)
    with pytest.raises(ApiError, match="input has 300200 tokens in 1501 texts"):
        _texts(service, ["a" * 200] * 1501, 250)
    with pytest.raises(ApiError, match=f"at most {MAX_TOKENIZED} are taken at once") as large:
        _token_ids(service, TokenizeRequest(prompt="a" * (MAX_TOKENIZED + 1)))
    assert large.value.param == "prompt"
    assert len(_token_ids(service, TokenizeRequest(prompt="a" * MAX_TOKENIZED))) == MAX_TOKENIZED


def test_texts_that_fit_are_taken_as_before(tiny: Tokenizer) -> None:
    service = service_of(tiny, 4096)
    text = "the quick brown fox " * 50
    prompts, _ = prepare_completion(service, CompletionRequest(prompt=text))
    assert prompts[0].ids == tiny.encode(text, add_special_tokens=True)
    said: Any = [{"role": "user", "content": text}]
    assert prepare_chat(service, ChatRequest(messages=said)).prompt == tiny.chat(said)


class Client:
    """Somebody who waits for an answer, and may leave."""

    def __init__(self, size: int) -> None:
        self.state = SimpleNamespace(body_bytes=size)
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        """That it left."""
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_short_texts_do_not_wait_behind_long_ones_nor_long_ones_for_who_left() -> None:
    service: Any = SimpleNamespace(workers=Workers())
    ended, called = threading.Event(), []

    def work(name: str) -> str:
        called.append(name)
        if name.startswith("long"):
            assert ended.wait(30)
        return name

    async def run() -> None:
        short, patient, leaving = Client(LONG_BODY), Client(LONG_BODY + 1), Client(LONG_BODY + 1)
        first = [asyncio.ensure_future(Service.work(service, patient, work, f"long {i}")) for i in range(12)]  # type: ignore[arg-type]
        gone = asyncio.ensure_future(Service.work(service, leaving, work, "long and left"))  # type: ignore[arg-type]
        began = time.perf_counter()
        assert await Service.work(service, short, work, "short") == "short"  # type: ignore[arg-type]
        assert time.perf_counter() - began < 10
        assert len(called) <= LONG_THREADS + 1
        leaving.left.set()
        with pytest.raises(ClientLeft):
            await gone
        ended.set()
        assert sorted(await asyncio.gather(*first)) == sorted(f"long {i}" for i in range(12))
        assert "long and left" not in called

    asyncio.run(run())
    service.workers.close()


def test_a_client_that_leaves_while_its_structure_is_compiled_gives_its_place_back() -> None:
    """The thread that waits for the structure is not waited for."""
    admission, ended, client = Admission(2, 2), threading.Event(), Client(10)

    def compile_slowly(structure: Structure) -> None:
        assert ended.wait(30)

    engine = SimpleNamespace(grammars=SimpleNamespace(compile=compile_slowly))
    service: Any = service_of(SimpleNamespace(vocab_size=5))
    service.background = SimpleNamespace(engine=engine, failure=None)
    service.admission, service.workers, service.log_prompts = admission, Workers(), False
    labelled = SimpleNamespace(inc=lambda *_: None)
    counter = SimpleNamespace(labels=lambda *_: labelled, inc=lambda *_: None)
    service.metrics = SimpleNamespace(prompt_tokens=counter, generated_tokens=counter, cached_tokens=counter)
    service.models = {}
    vars(client.state).update(began=time.perf_counter(), facts={}, client=SimpleNamespace(salt=b""))

    async def run() -> None:
        params = SamplingParams(structure=Structure("json_object"))
        asked = asyncio.ensure_future(Service.start(service, client, ServedModel("tiny"), [[1]], params))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        assert (admission.active, asked.done()) == (1, False)
        client.left.set()
        with pytest.raises(ClientLeft):
            await asyncio.wait_for(asked, 10)
        assert admission.active == 0
        ended.set()

    asyncio.run(run())
    service.workers.close()
