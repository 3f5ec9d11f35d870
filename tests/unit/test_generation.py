"""Generation: what runs when, streams, stop strings, refusals, and what it leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.answer import Generation
from arriero.engine.engine import Engine
from arriero.engine.runner import BLOCK_SIZE, TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import engine_of, generate_shared
from arriero.engine.text_stream import TextStream
from arriero.errors import GenerationError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.4,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, so that the random model's text is full of broken characters."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """In float64: a batch rounds differently from a lone row, and in fp32 two logits of some answer may be that close.

    In fp32 batches are compared with transformers in tests/parity/test_engine.py.
    """
    built = LlamaForCausalLM(CONFIG)
    built.init_weights(1234)
    return built.double()


def random_prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=random).tolist()
    return [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]


def shared_prompts() -> list[list[int]]:
    """Two passages below one common beginning, several questions each, and a stranger; shuffled."""
    head, first, second, stranger = (
        random_prompts(1, seed, 2)[0] * n for seed, n in ((1, 20), (2, 40), (3, 30), (4, 9))
    )
    questions = random_prompts(5, 7, 12)
    prompts = [head + first + q for q in questions] + [head + second + q for q in questions]
    prompts += [stranger, head + first, head + first + questions[0]]  # one is another's beginning, one comes twice
    return [prompts[i] for i in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()]


def engine_with(model: LlamaForCausalLM, tokenizer: Tokenizer, **limits: int) -> Engine:
    return Engine(TorchRunner(model, max_tokens=4096), tokenizer, **limits)


def answers(engine: Engine, prompts: list[list[int]], params: Any) -> list[tuple[list[int], str, str]]:
    return [(a.token_ids, a.text, a.finish_reason) for a in engine.generate(prompts, params)]


GREEDY = SamplingParams(max_new_tokens=16)
SAMPLED = SamplingParams(max_new_tokens=16, do_sample=True, temperature=0.9, top_k=40, top_p=0.95, seed=5)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompts", [random_prompts(11), shared_prompts()], ids=["random", "shared"])
@pytest.mark.parametrize("running", [3, 32])
def test_a_batch_gives_what_each_prompt_gives_alone(
    params: SamplingParams, prompts: list[list[int]], running: int, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    each = [replace(params, max_new_tokens=4 + i % 13) for i in range(len(prompts))]
    alone = [answers(engine_with(model, tokenizer), [p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    assert answers(engine_with(model, tokenizer, max_running=running), prompts, each) == alone
    assert generated(model, tokenizer, prompts, each) == [(ids, text) for ids, text, _ in alone]
    assert {reason for *_, reason in alone} <= {"stop", "length"}


def generated(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]], params: Sequence[SamplingParams]
) -> list[tuple[list[int], str]]:
    return [(a.token_ids, a.text) for a in generate_shared(model, tokenizer, prompts, params, max_running=3)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the forward passes from now on, in tokens."""
    sizes: list[int] = []
    original = TorchRunner.run

    def counting(self: TorchRunner, work: Sequence[Work]) -> torch.Tensor:
        sizes.append(sum(len(item.tokens) for item in work))
        return original(self, work)

    monkeypatch.setattr(TorchRunner, "run", counting)
    return sizes


@pytest.mark.parametrize("running", [2, 32])
def test_a_common_beginning_is_computed_once(
    running: int, model: LlamaForCausalLM, tokenizer: Tokenizer, computed: list[int]
) -> None:
    passage = random_prompts(1, 1, 2)[0] * 100
    prompts = [[*passage, i, i + 1, i + 2] for i in range(15)]
    engine_with(model, tokenizer, max_running=running).generate(prompts, SamplingParams(max_new_tokens=1))
    shared = len(passage) // BLOCK_SIZE * BLOCK_SIZE  # whole blocks
    assert sum(computed) == shared + len(prompts) * (len(prompts[0]) - shared)


def test_prefill_is_packed_and_bounded(model: LlamaForCausalLM, tokenizer: Tokenizer, computed: list[int]) -> None:
    prompts = random_prompts(12, 3)
    total = sum(map(len, prompts))
    engine_with(model, tokenizer).generate(prompts, SamplingParams(max_new_tokens=1))
    assert computed == [total]  # one pass, no padding
    computed.clear()
    engine_with(model, tokenizer, max_step_tokens=50).generate(prompts, SamplingParams(max_new_tokens=1))
    assert max(computed) <= 50
    assert sum(computed) == total


def test_finished_requests_leave(model: LlamaForCausalLM, tokenizer: Tokenizer, computed: list[int]) -> None:
    lengths = [2, 9, 3, 6]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
    engine_with(model, tokenizer, max_running=4).generate([[i, 200 - i] for i in range(4)], params)
    # One pass for all prompts, then as many rows as are still going.
    assert computed == [8] + [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_waiting_prompts_take_free_places(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    done: list[int] = []
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (20, 2, 2, 2, 2, 2)]
    results = engine_with(model, tokenizer, max_running=2).generate(
        [[i] for i in range(6)], params, on_done=lambda index, answer: done.append(index)
    )
    # The five short ones pass through one place while the long one keeps the other.
    assert done == [1, 2, 3, 4, 5, 0]
    assert [len(r.token_ids) for r in results] == [20, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("stop_strings", [(), ("e", "\ufffd\ufffd")])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_text_is_the_final_text(
    params: SamplingParams, stop_strings: tuple[str, ...], model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    params = replace(params, stop_strings=stop_strings, max_new_tokens=40)
    prompts = random_prompts(7, 5)
    engine = engine_with(model, tokenizer, max_running=3)
    streamed: dict[int, str] = dict.fromkeys(range(len(prompts)), "")

    def collect(index: int, piece: str) -> None:
        assert piece
        streamed[index] += piece

    finished: dict[int, Generation] = {}
    results = engine.generate(prompts, params, collect, finished.__setitem__)
    assert [streamed[i] for i in range(len(prompts))] == [r.text for r in results]
    assert [finished[i] for i in range(len(prompts))] == results
    assert ["".join(engine.stream(prompt, params)) for prompt in prompts] == [r.text for r in results]
    if not stop_strings:
        plain = [r.token_ids[:-1] if r.finish_reason == "stop" else r.token_ids for r in results]
        assert [r.text for r in results] == [tokenizer.decode(ids) for ids in plain]


def test_a_stop_string_across_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    engine = engine_with(model, tokenizer)
    prompt = random_prompts(1, 2)[0]
    free = engine.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True))[0].text
    stop = free[10:13]  # three characters, so at least three tokens
    cut = engine.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True, stop_strings=(stop,)))[0]
    assert cut.finish_reason == "stop_string"
    assert cut.text == free[: free.index(stop)]
    assert 3 <= len(cut.token_ids) < 40
    # Not before the least number of tokens.
    late = SamplingParams(max_new_tokens=40, min_new_tokens=40, ignore_eos=True, stop_strings=(stop,))
    assert len(engine.generate([prompt], late)[0].token_ids) == 40


def test_stop_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    engine = engine_with(model, tokenizer)
    prompt = random_prompts(1, 2)[0]
    free = engine.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))[0].token_ids
    own = engine.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(free[5],)))[0]
    first = free.index(free[5])
    assert own.token_ids == free[: first + 1]
    assert (own.finish_reason, own.text) == ("stop", tokenizer.decode(free[:first]))


def weights(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_stream_may_be_left(model: LlamaForCausalLM, tokenizer: Tokenizer, computed: list[int]) -> None:
    engine = engine_with(model, tokenizer)
    stream = engine.stream([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(computed) < 10
    assert engine.unfinished == 0
    engine.blocks.check([])


def test_streams_in_turns_and_whole_answers_between(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Each reads all of its own text, whoever lets the engine step; one that was never read ends too."""
    engine = engine_with(model, tokenizer)
    prompts = random_prompts(3, 5)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    alone = ["".join(engine.stream(prompt, params)) for prompt in prompts]
    first, second = engine.stream(prompts[0], params), engine.stream(prompts[1], params)
    unread = engine.stream(prompts[2], params)
    texts = ["", ""]
    for pieces in zip(first, second, strict=False):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if len(texts[0]) % 3 == 0:
            assert engine.generate([prompts[2]], params)[0].text == alone[2]
    texts = [texts[0] + "".join(first), texts[1] + "".join(second)]
    assert texts == alone[:2]
    assert engine.unfinished <= 1
    del unread
    assert engine.unfinished == 0
    engine.blocks.check([])


def test_the_model_is_as_it_was(tokenizer: Tokenizer) -> None:
    """After answers, and after an error: in its mode, with its weights, and to be trained."""
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(3)
    before = weights(model)
    model.train()
    with engine_of(model, tokenizer) as engine:
        assert not model.training
        for _ in engine.stream([1, 2, 3], SamplingParams(max_new_tokens=3)):
            assert not torch.is_inference_mode_enabled()  # the caller's code is not in our mode
    assert model.training
    with pytest.raises(GenerationError), engine_of(model, tokenizer) as engine:
        engine.generate([[1], []], GREEDY)
    assert model.training
    with pytest.raises(GenerationError, match="prompt 1: the prompt is empty"):
        generate_shared(model, tokenizer, [[1], []], [GREEDY, GREEDY])
    assert model.training
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    model.eval()
    generate_shared(model, tokenizer, [[1]], [GREEDY])
    assert not model.training


def test_weights_may_change_between_two_calls(tokenizer: Tokenizer) -> None:
    """As in training; against whole forward passes without a cache."""
    model = LlamaForCausalLM(CONFIG)
    seen = []
    for seed in (1, 2):
        model.init_weights(seed)  # in place
        prompt = list(range(40))
        [answer] = generate_shared(model, tokenizer, [prompt], [replace(GREEDY, ignore_eos=True)])
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(16):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert answer.token_ids == tokens[len(prompt) :]
        seen.append(answer.token_ids)
    assert seen[0] != seen[1]


def test_an_engine_takes_no_memory_before_it_is_used(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with engine_of(model, tokenizer, useful_tokens=1 << 20) as engine:
        assert engine.runner.num_blocks * engine.runner.block_size == 1 << 20  # of 512 bytes each: half a GB
        assert process.memory_info().rss - before < 64 << 20
        assert engine.generate([[1] * 240], replace(GREEDY, ignore_eos=True))[0].prompt_tokens == 240
        assert process.memory_info().rss - before < 96 << 20


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "the prompt is empty"),
        ([[1], [256]], GREEDY, "prompt 1: the prompt holds token id 256 and the model has ids 0 to 255"),
        ([[-1]], GREEDY, "token id -1"),
        ([[1] * 250], GREEDY, "250 tokens and max_new_tokens is 16.*max_position_embeddings, 256"),
        ([[1], [2]], [GREEDY], "2 prompts and 1 sampling parameters"),
    ],
)
def test_refusals(prompts: Any, params: Any, message: str, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    engine = engine_with(model, tokenizer)
    with pytest.raises(GenerationError, match=message):
        engine.generate(prompts, params)
    assert engine.unfinished == 0
    if len(prompts) == 1:
        with pytest.raises(GenerationError, match=message):
            engine.stream(prompts[0], params)


def test_limits(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="max_running 0"):
        engine_with(model, tokenizer, max_running=0)
    assert engine_with(model, tokenizer).generate([], GREEDY) == []
    assert generate_shared(model, tokenizer, [], []) == []
    whole = generate_shared(model, tokenizer, [[1] * 240], [replace(GREEDY, ignore_eos=True)])[0]
    assert len(whole.token_ids) == 16  # to the very last position


def test_broken_weights_are_reported(tokenizer: Tokenizer) -> None:
    broken = LlamaForCausalLM(CONFIG)
    broken.init_weights()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match="no finite numbers"):
        generate_shared(broken, tokenizer, [[1]], [GREEDY])


# The parts.


def test_text_is_held_back_only_while_a_stop_string_can_begin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.stream_decoder(), ("stop!", "toe"))
    pieces = [stream.push(token) for token in tokenizer.encode("a st sto stop? toad stop! more")]
    assert stream.stopped
    assert "".join(pieces) == stream.text == "a st sto stop? toad "
    # "s", "t" and "o" wait; what can no longer become a stop string comes at once.
    assert pieces[:8] == ["a", " ", "", "", "st ", "", "", ""]
    assert stream.finish() == ""


def test_held_text_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.stream_decoder(), ("stop!",))
    pieces = [stream.push(token) for token in tokenizer.encode("a stop")]
    assert "".join(pieces) == "a "
    assert stream.finish() == "stop"
    assert not stream.stopped


def test_the_earliest_stop_string_counts(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.stream_decoder(), ("b", "ab"))
    pieces = [stream.push(token) for token in tokenizer.encode("xab")]
    assert "".join(pieces) == "x"
