"""An answer is the same whatever happens beside it: chunks, shared beginnings, lost blocks, guesses, company."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.draft_model import DraftModel
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import GenerationError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer

transformers = pytest.importorskip("transformers")

VOCABULARY = 256
SHARED = list(range(20, 80))
PROMPTS = [[1, 2, 3], [7], [*SHARED, 81], [5, 5, 5, 9, 200], [*SHARED, 3], [9, 8, 9, 8, 9, 8, 9], SHARED, SHARED]
NEW = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def pair(seed: int = 0, **changes: Any) -> tuple[LlamaForCausalLM, Any]:
    """The same random weights in ours and in transformers' model."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,  # large: distinct logits, and answers that do not repeat one token
        "tie_word_embeddings": False,
        "model_type": "llama",
    } | changes
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), attn_implementation="eager"
    ).eval()
    ours = LlamaForCausalLM(LlamaConfig.from_dict(theirs.config.to_dict())).eval()
    ours.init_weights(seed)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def expected(theirs: Any, prompt: list[int], max_new_tokens: int = NEW, **settings: Any) -> list[int]:
    output = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    return output[0, len(prompt) :].tolist()


FAMILIES = {
    "llama": {},
    "tied": {"rope_theta": 500.0, "tie_word_embeddings": True},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, list[list[int]]]:
    ours, theirs = pair(**FAMILIES[request.param])
    return ours, [expected(theirs, prompt) for prompt in PROMPTS]


# Blocks of a token and of 16, with the cache of beginnings and without; in `make test`, each of the four with some guesses.
SOME = {"no": ((16, True), (1, False)), "lookup": ((1, True), (16, False)), "draft": ((16, True),)}
OTHERS = {guess: tuple(set(itertools.product((1, 16), (True, False))) - set(some)) for guess, some in SOME.items()}


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.peers)])
@pytest.mark.parametrize("guess", SOME)
@pytest.mark.parametrize(("budget", "running", "tokens"), [(2048, 8, 4096), (7, 3, 4096), (24, 8, 120)], ids=str)
def test_greedy_is_transformers_in_every_circumstance(
    family: tuple[LlamaForCausalLM, list[list[int]]],
    tokenizer: Tokenizer,
    budget: int,
    running: int,
    tokens: int,
    guess: str,
    some: bool,
) -> None:
    model, wanted = family
    for block_size, cache in (SOME if some else OTHERS)[guess]:
        speculation = None
        if guess == "lookup":
            speculation = Speculation(PromptLookup(longest=2, shortest=1), tokens=3, window=10**9)
        elif guess == "draft":  # the model itself, whose guesses are right wherever they are checked at once
            speculation = Speculation(DraftModel(TorchRunner(model, max_tokens=1024), VOCABULARY), window=10**9)
        engine = Engine(
            TorchRunner(model, block_size=block_size, max_tokens=tokens),
            tokenizer,
            max_running=running,
            max_step_tokens=budget,
            prefix_cache=cache,
            speculation=speculation,
        )
        answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        assert [answer.token_ids for answer in answers] == wanted
        engine.blocks.check([])
        if tokens == 120:
            assert engine.scheduler.preemptions > 0
        if cache and tokens > 1000 and block_size == 1:
            assert answers[4].cached_tokens == len(SHARED)
        if speculation is not None and tokens > 1000:
            assert speculation.counters.proposed > 0
            assert guess != "draft" or speculation.counters.acceptance > 0.95


def test_beginnings_are_shared_under_dynamic_rope_up_to_the_end_of_the_context(tokenizer: Tokenizer) -> None:
    """Its angles change only beyond `max_position_embeddings`, which is the engine's context."""
    longest = 64
    ours, theirs = pair(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=longest)
    prompts = [[*SHARED[:40], token] for token in (1, 2, 3)]
    engine = Engine(TorchRunner(ours, max_tokens=1024), tokenizer, max_running=2)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=longest - 41))
    assert [answer.token_ids for answer in answers] == [expected(theirs, prompt, longest - 41) for prompt in prompts]
    assert [answer.cached_tokens for answer in answers] == [0, 32, 32], "whole blocks"
    with pytest.raises(GenerationError, match="together more than max_position_embeddings, 64"):
        engine.submit(prompts[0], SamplingParams(max_new_tokens=longest - 40))


def test_what_is_drawn_does_not_depend_on_company_or_guesses(tokenizer: Tokenizer) -> None:
    model, _ = pair()
    params = [
        SamplingParams(max_new_tokens=NEW, do_sample=True, temperature=0.8, top_p=0.9, seed=seed, frequency_penalty=0.2)
        for seed in range(len(PROMPTS))
    ]
    alone = [
        Engine(TorchRunner(model, max_tokens=512), tokenizer).generate([prompt], own)[0].token_ids
        for prompt, own in zip(PROMPTS, params, strict=True)
    ]
    assert len({tuple(answer) for answer in alone}) == len(alone)
    small, _ = pair(seed=1, hidden_size=16)
    for drafter in (None, PromptLookup(longest=2, shortest=1), DraftModel(TorchRunner(small, max_tokens=1024), 256)):
        speculation = Speculation(drafter, window=10**9) if drafter is not None else None
        engine = Engine(
            TorchRunner(model, max_tokens=200), tokenizer, max_step_tokens=16, max_running=5, speculation=speculation
        )
        assert [answer.token_ids for answer in engine.generate(PROMPTS, params)] == alone


def test_end_of_text_penalty_and_least_length(tokenizer: Tokenizer) -> None:
    ours, theirs = pair()
    free = [expected(theirs, prompt) for prompt in PROMPTS]
    eos = [free[0][4], free[1][3], free[2][6]]  # tokens that do come early in these answers
    engine = Engine(TorchRunner(ours, max_tokens=1024), tokenizer, max_running=2)
    seen = set()
    for penalty, least in itertools.product((1.0, 1.3), (0, 9)):
        params = SamplingParams(
            max_new_tokens=NEW, min_new_tokens=least, repetition_penalty=penalty, stop_token_ids=tuple(eos)
        )
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
            wanted = expected(
                theirs, prompt, min_new_tokens=least or None, repetition_penalty=penalty, eos_token_id=eos
            )
            ended = wanted[-1] in eos
            assert answer.token_ids == wanted
            assert answer.finish_reason == ("stop" if ended else "length")
            assert len(answer.token_ids) > least
            assert answer.text == tokenizer.decode(wanted[:-1] if ended else wanted)
            assert answer.prompt_tokens == len(prompt)
            seen.add((answer.finish_reason, least))
    assert seen >= {("stop", 0), ("length", 9)}


def test_log_probabilities_are_those_of_one_forward_pass(tokenizer: Tokenizer) -> None:
    model, theirs = pair()
    engine = Engine(
        TorchRunner(model, max_tokens=512),
        tokenizer,
        speculation=Speculation(PromptLookup(longest=1, shortest=1), window=10**9),
    )
    for prompt, answer in zip(
        PROMPTS, engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, logprobs=3)), strict=True
    ):
        assert len(answer.logprobs) == len(answer.token_ids)
        row = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logits = theirs(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for step, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert found.logprob == pytest.approx(float(logits[step, token]), abs=1e-4)
            assert [index for index, _ in found.top] == logits[step].topk(3).indices.tolist()


def test_requests_come_and_go_between_steps(tokenizer: Tokenizer) -> None:
    model, theirs = pair()
    engine = Engine(TorchRunner(model, max_tokens=256), tokenizer, max_step_tokens=8, max_running=2)
    params = SamplingParams(max_new_tokens=NEW)
    first = engine.submit(PROMPTS[2], params)
    for _ in range(3):
        engine.step()
    second, third = engine.submit(PROMPTS[0], params), engine.submit(PROMPTS[1], params)
    engine.step()
    engine.cancel(second)
    while engine.unfinished:
        engine.step()
    assert first.token_ids == expected(theirs, PROMPTS[2])
    assert third.token_ids == expected(theirs, PROMPTS[1])
    assert second.finish_reason == "cancelled"
    engine.cancel(first)  # which has ended: nothing changes
    assert first.finish_reason == "length"
    engine.blocks.check([])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 256], {}, "token id 256 and the model has ids 0 to 255"),
        ([1] * 250, {"max_new_tokens": 7}, "250 tokens and max_new_tokens is 7: together more than .* 256"),
        ([1] * 70, {"max_new_tokens": 70}, "140 tokens .* need 9 blocks of 16, .* 8 in all"),
        ([1], {"logit_bias": {300: 1.0}}, "logit_bias names token id 300"),
    ],
)
def test_an_impossible_request_is_refused_and_the_others_go_on(
    prompt: list[int], params: dict[str, Any], message: str, tokenizer: Tokenizer
) -> None:
    model, theirs = pair()
    engine = Engine(TorchRunner(model, max_tokens=128), tokenizer)
    other = engine.submit(PROMPTS[0], SamplingParams(max_new_tokens=NEW))
    engine.step()
    with pytest.raises(GenerationError, match=message):
        engine.submit(prompt, SamplingParams(**{"max_new_tokens": 8, **params}))
    while engine.unfinished:
        engine.step()
    assert other.token_ids == expected(theirs, PROMPTS[0])


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    small, _ = pair(vocab_size=128)
    with pytest.raises(GenerationError, match="the draft model has 128 tokens and the model 256"):
        DraftModel(TorchRunner(small, max_tokens=64), VOCABULARY)


def test_speculation_stops_where_it_loses_and_tries_again() -> None:
    speculation = Speculation(PromptLookup(), window=4, hold=2)
    seen = []
    for _ in range(60):
        speculation.measure(1, 1.0 if speculation.on else 0.5)
        seen.append(speculation.on)
    off = seen.count(False)
    assert 0 < seen.count(True) < off, "off for longer than on"
    assert True in seen[30:], "and tried again"


def test_pauses_between_requests_do_not_switch_speculation(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with guesses take half the time here, and the server waits for a request in the turn that is measured with them."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model, _ = pair()
    speculation = Speculation(PromptLookup(), window=4, hold=8)
    engine = Engine(TorchRunner(model, max_tokens=128), tokenizer, speculation=speculation)
    run = engine.runner.run

    def timed(work: Any) -> Any:
        clock[0] += 1.0 if speculation.on else 2.0
        return run(work)

    monkeypatch.setattr(engine.runner, "run", timed)
    seen = []
    for prompt in range(12):
        engine.submit([prompt], SamplingParams(max_new_tokens=2, ignore_eos=True))
        while engine.unfinished:
            engine.step()
            seen.append(speculation.on)
        clock[0] += 100.0 if speculation.on else 0.0
    assert seen[8:] == [True] * (len(seen) - 8), "on, after a turn of each"


def test_smollm2(smollm2: Path) -> None:
    """The real model, in little room."""
    from arriero.formats.hf import load_model

    tokenizer = load_tokenizer(smollm2)
    ours = load_model(smollm2, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    texts = ["What is the capital of France?", "Write one sentence about 🐎 in Spanish."]
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    engine = Engine(TorchRunner(ours, max_tokens=128), tokenizer, max_step_tokens=16)
    for prompt, answer in zip(prompts, engine.generate(prompts, SamplingParams(max_new_tokens=8)), strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=8
        )
        assert answer.token_ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.peers
@pytest.mark.timeout(900)
def test_batched_is_alone_on_the_real_model(smollm2: Path) -> None:
    """fp32, token for token, prompts of very different lengths, eight of them running at a time."""
    from arriero.formats.hf import load_model

    tokenizer = load_tokenizer(smollm2)
    runner = TorchRunner(load_model(smollm2, dtype=torch.float32), max_tokens=8192)
    texts = Path(__file__).read_text(encoding="utf-8").split("\n\n")
    prompts = [tokenizer.chat([{"role": "user", "content": f"Explain:\n{text[:700]}"}]) for text in texts]
    assert len(prompts) >= 16
    params = SamplingParams(max_new_tokens=24)
    together = Engine(runner, tokenizer, max_running=8).generate(prompts, params)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = Engine(runner, tokenizer, max_running=1, prefix_cache=False).generate([prompt], params)
        assert answer.token_ids == alone.token_ids
