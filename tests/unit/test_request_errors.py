"""Bad requests: one clear error for each, and the answers of the others are what they are without it."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.background import BackgroundEngine
from arriero.engine.engine import Engine
from arriero.engine.grammar import CompiledGrammar
from arriero.engine.runner import TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.engine.ticket import Piece
from arriero.errors import GenerationError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer

VOCABULARY, CONTEXT, CACHE = 256, 128, 96
OTHERS = [[1, 2, 3], [7] * 20, [5, 6]]
PARAMS = SamplingParams(max_new_tokens=16, do_sample=True, seed=4)
NAN = 13  # a prompt with this token gets logits that are no numbers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


class BreakingRunner(TorchRunner):
    """Gives no numbers for prompts with `NAN`."""

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> torch.Tensor:
        logits = super().run(work)
        end = 0
        for item in work:
            end += item.logits
            if NAN in item.tokens:
                logits[end - item.logits : end] = math.nan
        return logits


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config).eval()
    model.init_weights(3)
    return model


@pytest.fixture
def engine(model: LlamaForCausalLM, tokenizer: Tokenizer) -> Engine:
    return Engine(BreakingRunner(model, max_tokens=CACHE), tokenizer, max_step_tokens=16)


@pytest.fixture(scope="module")
def alone(model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[list[int]]:
    """The others' answers, each by itself."""
    return [
        Engine(TorchRunner(model, max_tokens=CACHE), tokenizer).generate([prompt], PARAMS)[0].token_ids
        for prompt in OTHERS
    ]


BAD_VALUES: list[tuple[str, Any]] = [
    *[("max_new_tokens", value) for value in (0, -1, 1.0, "5", True, None, 2**31)],
    *[("min_new_tokens", value) for value in (-1, 17, 0.5)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, -math.inf, "1", 1e7, 10**400)],
    *[("top_k", value) for value in (-1, 2.5, math.nan, 2**31, True)],
    *[("top_p", value) for value in (0.0, -1.0, 1.1, math.nan, math.inf, "0.5")],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 1e-9, 101.0, math.inf, math.nan)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, math.nan, None)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, math.inf)],
    *[("logprobs", value) for value in (-1, 101, 1.5, True)],
    *[("prompt_logprobs", value) for value in (-1, 101, 1.5, "1")],
    *[("n", value) for value in (0, -1, 129, 1.5, None, True)],
    *[("best_of", value) for value in (0, 129, 2.5)],
    *[("seed", value) for value in (-1, 2**64, 0.5, "0")],
    *[("do_sample", value) for value in (1, "false")],
    *[("ignore_eos", value) for value in (0, "false")],
    *[("stop_token_ids", value) for value in ((-1,), (1.5,), ("a",), (True,), 7, range(2000), [0] * 1025)],
    *[("stop_strings", value) for value in ("stop", ("",), (1,), (None,), ("x",) * 65, ("x" * 257,))],
    *[
        ("logit_bias", value)
        for value in ([1], {-1: 0.0}, {"1": 0.0}, {1: math.nan}, {1: math.inf}, {1: 101}, {1: "2"})
    ],
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    *[("structure", value) for value in ("json", {"kind": "regex"})],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: repr(value)[:30])
def test_a_value_that_no_request_can_have_is_named(name: str, value: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        SamplingParams(**{"max_new_tokens": 16, name: value})
    text = str(caught.value)
    assert text.startswith(f"{name} is ")
    assert "it must be" in text
    assert "\n" not in text
    assert len(text) < 250


def test_best_of_is_at_least_n() -> None:
    with pytest.raises(GenerationError, match="best_of is 2: it must be from 3 to 128"):
        SamplingParams(n=3, best_of=2)


BAD_REQUESTS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "the prompt is empty"),
    ([1, VOCABULARY], {}, "token id 256 and the model has ids 0 to 255"),
    ([-1], {}, "token id -1 and"),
    ([2**70], {}, "token id 1180591620717411303424 and"),
    ([1, 2.0], {}, "something else than token ids"),
    ([1, None], {}, "something else than token ids"),
    (["1"], {}, "something else than token ids"),
    ([1] * CONTEXT, {"max_new_tokens": 1}, "128 tokens and max_new_tokens is 1: together more than .* 128"),
    ([1], {"max_new_tokens": 2**31 - 1}, "max_new_tokens is 2147483647: together more than"),
    ([1] * 64, {"max_new_tokens": 48}, "112 tokens .* need 7 blocks of 16, .* 6 in all"),
    ([1], {"logit_bias": {300: 1.0}}, "logit_bias names token id 300 and the model has ids 0 to 255"),
    ([1], {"max_new_tokens": 2**20, "logprobs": 1, "n": 2}, "ask for up to 4194304 log-probabilities: at most 2097152"),
    ([1], {"structure": Structure("json_schema", "{")}, "the JSON schema is not JSON"),
    ([1], {"structure": Structure("json_schema", {"type": "nothing"})}, "the json_schema cannot be used"),
    ([1], {"structure": Structure("regex", "(a")}, "the regex cannot be used"),
    ([1], {"structure": Structure("grammar", "start: start")}, "the grammar cannot be used"),
    ([1], {"structure": Structure("choice", ["a" * 70_000])}, "the choice has 70000 bytes: at most 65536"),
]


@pytest.mark.parametrize(("prompt", "values", "message"), BAD_REQUESTS, ids=lambda value: repr(value)[:30])
def test_an_impossible_request_is_refused_while_others_run(
    prompt: Any, values: dict[str, Any], message: str, engine: Engine, alone: list[list[int]]
) -> None:
    if "structure" in values:
        pytest.importorskip("llguidance")
    others = [engine.submit(other, PARAMS) for other in OTHERS[:2]]
    for _ in range(3):
        engine.step()
    with pytest.raises(GenerationError, match=message) as caught:
        engine.submit_group(prompt, SamplingParams(**{"max_new_tokens": 8, **values}))
    assert "\n" not in str(caught.value)
    assert engine.unfinished == 2
    others.append(engine.submit(OTHERS[2], PARAMS))
    while engine.unfinished:
        engine.step()
    assert [other.token_ids for other in others] == alone
    engine.blocks.check([])


@pytest.mark.parametrize(
    "structure",
    [
        # an object that never ends, and a repetition that would have a billion states if it were written out
        Structure("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        Structure("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ],
    ids=["endless", "exploding"],
)
def test_a_structure_without_end_costs_its_answer_alone(
    structure: Structure, engine: Engine, alone: list[list[int]]
) -> None:
    pytest.importorskip("llguidance")
    others = [engine.submit(other, PARAMS) for other in OTHERS]
    endless = engine.submit([1], SamplingParams(max_new_tokens=8, structure=structure))
    while engine.unfinished:
        engine.step()
    assert endless.finish_reason == "length"
    assert [other.token_ids for other in others] == alone


@pytest.mark.parametrize(
    "options", [{"priority": "x"}, {"priority": math.nan}, {"salt": "x"}, {"adapter": 7}], ids=lambda value: str(value)
)
def test_an_option_of_another_type_is_refused_while_others_run(
    options: dict[str, Any], engine: Engine, alone: list[list[int]]
) -> None:
    others = [engine.submit(other, PARAMS) for other in OTHERS]
    engine.step()
    with pytest.raises(GenerationError, match=f"{next(iter(options))} is .*: it must be"):
        engine.submit([1] * 40, PARAMS, **options)
    while engine.unfinished:
        engine.step()
    assert [other.token_ids for other in others] == alone


def test_a_step_that_always_fails_ends_what_waits_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no step today")

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    serving = BackgroundEngine(engine)
    with pytest.raises(GenerationError, match="no step today"):
        serving.submit([1, 2, 3], PARAMS).result()
    assert serving.close()
    assert not engine.unfinished


def test_a_whole_answer_is_told_of_once(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    told: list[int] = []
    Engine(TorchRunner(model, max_tokens=512), tokenizer).generate(
        [[1, 2, 3], [4]], SamplingParams(max_new_tokens=5, n=3), on_done=lambda number, _: told.append(number)
    )
    assert sorted(told) == [0, 1]


def test_logits_that_are_no_numbers_fail_their_request_alone(engine: Engine, alone: list[list[int]]) -> None:
    others = [engine.submit(other, PARAMS) for other in OTHERS]
    broken = [engine.submit([4, NAN], PARAMS), engine.submit([NAN] * 20, SamplingParams(max_new_tokens=4))]
    while engine.unfinished:
        engine.step()
    assert [other.token_ids for other in others] == alone
    for answer in broken:
        assert (answer.finish_reason, answer.token_ids) == ("error", [])
        with pytest.raises(GenerationError, match="no finite numbers"):
            answer.result(engine.tokenizer)
    with pytest.raises(GenerationError, match=r"prompt 1: .* no finite numbers"):
        engine.generate([OTHERS[0], [NAN]], PARAMS)
    assert not engine.unfinished
    engine.blocks.check([])


def test_what_is_cancelled_before_its_start_leaves_nothing(engine: Engine, alone: list[list[int]]) -> None:
    several = SamplingParams(max_new_tokens=8, n=3, prompt_logprobs=2)
    early = [engine.submit([1, 2], PARAMS), engine.submit_group([1] * 40, several)]
    others = [engine.submit(other, PARAMS) for other in OTHERS]
    for one in early:
        engine.cancel(one)
    begun = engine.submit_group([1] * 40, several)
    engine.step()
    engine.cancel(begun)
    while engine.unfinished:
        engine.step()
    assert [other.token_ids for other in others] == alone
    assert [one.finish_reason for one in (early[0], *early[1].answers, *begun.answers)] == ["cancelled"] * 7  # type: ignore[union-attr]
    result = begun.result(engine.tokenizer)
    assert (result.token_ids, result.text, len(result.alternatives)) == ([], "", 2)
    engine.blocks.check([])
    assert engine.blocks.available == engine.blocks.num_blocks


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64 - 1, 2**70, -(2**70), 10**400]),
    st.floats(),
    st.sampled_from([1e-45, 1e-38, 1e-300, 1e-30, 0.5, 1.0, 1e6, 1e38, 1e300]),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 300), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.integers(-2, 300), st.text(max_size=2)), st.floats(-150, 150), max_size=3),
    st.just(list(range(VOCABULARY))),
)
NAMES = [name for name in SamplingParams.__dataclass_fields__ if name != "structure"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from(NAMES), WILD, max_size=5), prompt=st.lists(st.integers(-1, 300), max_size=30)
)
def test_whatever_a_request_says_it_is_answered_or_refused(
    values: dict[str, Any], prompt: list[int], engine: Engine, alone: list[list[int]]
) -> None:
    others = [engine.submit(OTHERS[0], PARAMS)]
    engine.step()
    group = None
    with contextlib.suppress(GenerationError):
        group = engine.submit_group(prompt, SamplingParams(**{"max_new_tokens": 4, "do_sample": True, **values}))
    others.append(engine.submit(OTHERS[2], PARAMS))
    while engine.unfinished:
        engine.step()
    assert [other.token_ids for other in others] == [alone[0], alone[2]]
    if group is not None and NAN not in prompt and not group.error:
        result = group.result(engine.tokenizer)
        assert len(result.alternatives) == group.params.n - 1
        assert len(result.token_ids) >= 1
    engine.blocks.check([])


@pytest.fixture
def background(engine: Engine) -> Iterator[BackgroundEngine]:
    serving = BackgroundEngine(engine)
    yield serving
    serving.close()


def test_several_answers_come_piece_by_piece(
    background: BackgroundEngine, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    params = SamplingParams(max_new_tokens=10, do_sample=True, seed=1, n=3, logprobs=1, prompt_logprobs=1)
    [whole] = Engine(TorchRunner(model, max_tokens=CACHE), tokenizer).generate([[1, 2, 3]], params)
    pieces = list(background.submit([1, 2, 3], params))
    for index, wanted in enumerate([whole, *whole.alternatives]):
        own = [piece for piece in pieces if piece.index == index]
        assert [token for piece in own for token in piece.token_ids] == wanted.token_ids
        assert "".join(piece.text for piece in own) == wanted.text
        assert [piece.result is not None for piece in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].result is not None
        assert own[-1].result.token_ids == wanted.token_ids
        assert len(own[-1].result.prompt_logprobs) == (3 if index == 0 else 0)
    together = background.submit([1, 2, 3], params).result()
    assert [one.token_ids for one in together.alternatives] == [one.token_ids for one in whole.alternatives]


def test_the_best_answers_come_whole(
    background: BackgroundEngine, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    params = SamplingParams(max_new_tokens=10, do_sample=True, seed=1, n=2, best_of=5)
    [best] = Engine(TorchRunner(model, max_tokens=CACHE), tokenizer).generate([[1, 2, 3]], params)
    pieces = list(background.submit([1, 2, 3], params))
    assert pieces == [
        Piece(one.text, tuple(one.token_ids), piece.result, index)
        for index, (one, piece) in enumerate(zip((best, *best.alternatives), pieces, strict=True))
    ]
    assert [piece.result and piece.result.text for piece in pieces] == [piece.text for piece in pieces]


def test_one_error_ends_a_request_for_several_answers(background: BackgroundEngine, alone: list[list[int]]) -> None:
    others = [background.submit(other, PARAMS) for other in OTHERS]
    for params in (SamplingParams(max_new_tokens=9, n=3), SamplingParams(max_new_tokens=9, n=1, best_of=3)):
        ticket = background.submit([1, NAN], params)
        with pytest.raises(GenerationError, match="no finite numbers"):
            ticket.result()
        assert list(ticket) == [], "nothing follows"
    strange = background.submit([1], PARAMS, colour="red")
    with pytest.raises(GenerationError, match="the request cannot be taken"):
        strange.result()
    assert [other.result().token_ids for other in others] == alone
    many = background.submit([1], SamplingParams(max_new_tokens=60, n=4))
    next(iter(many))
    many.cancel()
    assert {piece.result.finish_reason for piece in many if piece.result} == {"cancelled"}
    assert background.submit(OTHERS[0], PARAMS).result().token_ids == alone[0]
    assert not background._tickets
    assert not background._answers
    assert not background._sent
    background.engine.blocks.check([])


def test_others_go_on_while_a_structure_is_compiled(
    background: BackgroundEngine, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    gate, compile_, made = threading.Event(), CompiledGrammar.compile, []

    def held_up(*arguments: Any) -> CompiledGrammar:
        assert gate.wait(60)
        return compile_(*arguments)

    monkeypatch.setattr(CompiledGrammar, "compile", held_up)
    params = SamplingParams(max_new_tokens=8, structure=Structure("choice", ["yes", "no"]))
    asking = threading.Thread(target=lambda: made.append(background.submit([1], params).result().text))
    asking.start()
    assert [background.submit(other, PARAMS).result().token_ids for other in OTHERS] == alone
    assert not made
    gate.set()
    asking.join(60)
    assert made[0] in ("yes", "no")
