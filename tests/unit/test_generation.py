"""Generation: batches, shared beginnings, chunks, streams, stop strings and refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.generation import Generation, Generator
from arriero.engine.row_pool import MIN_SHARED_TOKENS, PrefillJob, common_prefix, split_jobs
from arriero.engine.sampling import SamplingParams
from arriero.engine.text_stream import TextStream
from arriero.errors import GenerationError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

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
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 77}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """In float64: a batch rounds differently from a lone row, and in fp32 two logits of some answer may be that close.

    In fp32 batches are compared with transformers in tests/parity/test_generation_parity.py.
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


def answers(generator: Generator, prompts: list[list[int]], params: Any) -> list[tuple[list[int], str, str]]:
    return [(a.token_ids, a.text, a.finish_reason) for a in generator.generate(prompts, params)]


GREEDY = SamplingParams(max_new_tokens=16)
SAMPLED = SamplingParams(max_new_tokens=16, do_sample=True, temperature=0.9, top_k=40, top_p=0.95, seed=5)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompts", [random_prompts(11), shared_prompts()], ids=["random", "shared"])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_batch_gives_what_each_prompt_gives_alone(
    params: SamplingParams, prompts: list[list[int]], batch: int, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    each = [replace(params, max_new_tokens=4 + i % 13) for i in range(len(prompts))]
    alone = [answers(Generator(model, tokenizer), [p], [own])[0] for p, own in zip(prompts, each, strict=True)]
    assert answers(Generator(model, tokenizer, max_batch_size=batch), prompts, each) == alone
    assert {reason for *_, reason in alone} <= {"stop", "length"}


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunks_of_a_prompt_give_the_same(budget: int, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    prompts = random_prompts(5) + shared_prompts()[:4]
    expected = answers(Generator(model, tokenizer), prompts, GREEDY)
    assert answers(Generator(model, tokenizer, max_prefill_tokens=budget), prompts, GREEDY) == expected


def test_little_cache_gives_the_same(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    prompts = random_prompts(9) + shared_prompts()
    expected = answers(Generator(model, tokenizer), prompts, GREEDY)
    assert answers(Generator(model, tokenizer, max_cache_tokens=150), prompts, GREEDY) == expected


def prefilled(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the forward passes from now on."""
    sizes: list[int] = []
    original = model.hidden_states

    def counting(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(input_ids.numel())
        return original(input_ids, *rest)

    monkeypatch.setattr(model, "hidden_states", counting)
    return sizes


@pytest.mark.parametrize("batch", [2, 32])
def test_a_common_beginning_is_computed_once(
    batch: int, model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passage = random_prompts(1, 1, 2)[0] * 100
    prompts = [[*passage, i, i + 1, i + 2] for i in range(15)]
    sizes = prefilled(model, monkeypatch)
    Generator(model, tokenizer, max_batch_size=batch).generate(prompts, SamplingParams(max_new_tokens=1))
    assert sum(sizes) == len(passage) + 3 * len(prompts)


def test_prefill_is_packed_and_bounded(
    model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(12, 3)
    total = sum(map(len, prompts))
    sizes = prefilled(model, monkeypatch)
    Generator(model, tokenizer, max_prefill_tokens=total).generate(prompts, SamplingParams(max_new_tokens=1))
    assert sizes == [total]  # one pass, no padding
    sizes.clear()
    Generator(model, tokenizer, max_prefill_tokens=50).generate(prompts, SamplingParams(max_new_tokens=1))
    assert max(sizes) <= 50
    assert sum(sizes) == total


def test_finished_rows_make_room(
    model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[i, 200 - i] for i in range(4)]
    lengths = [2, 9, 3, 6]
    sizes = prefilled(model, monkeypatch)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
    Generator(model, tokenizer, max_batch_size=4).generate(prompts, params)
    # One pass for all prompts, then as many rows as are still going.
    assert sizes == [8] + [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_waiting_prompts_take_free_rows(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    done: list[int] = []
    prompts = [[i] for i in range(6)]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (20, 2, 2, 2, 2, 2)]
    results = Generator(model, tokenizer, max_batch_size=2).generate(
        prompts, params, on_done=lambda index, answer: done.append(index)
    )
    # The five short ones pass through one row while the long one keeps the other.
    assert done == [1, 2, 3, 4, 5, 0]
    assert [len(r.token_ids) for r in results] == [20, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("stop_strings", [(), ("e", "\ufffd\ufffd")])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_text_is_the_final_text(
    params: SamplingParams, stop_strings: tuple[str, ...], model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    params = replace(params, stop_strings=stop_strings, max_new_tokens=40)
    prompts = random_prompts(7, 5)
    generator = Generator(model, tokenizer, max_batch_size=3)
    streamed: dict[int, str] = dict.fromkeys(range(len(prompts)), "")

    def collect(index: int, piece: str) -> None:
        assert piece
        streamed[index] += piece

    finished: dict[int, Generation] = {}
    results = generator.generate(prompts, params, collect, finished.__setitem__)
    assert [streamed[i] for i in range(len(prompts))] == [r.text for r in results]
    assert [finished[i] for i in range(len(prompts))] == results
    assert ["".join(generator.stream(prompt, params)) for prompt in prompts] == [r.text for r in results]
    if not stop_strings:
        plain = [r.token_ids[:-1] if r.finish_reason == "stop" else r.token_ids for r in results]
        assert [r.text for r in results] == [tokenizer.decode(ids) for ids in plain]


def test_a_stop_string_across_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    generator = Generator(model, tokenizer)
    prompt = random_prompts(1, 2)[0]
    free = generator.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True))[0].text
    stop = free[10:13]  # three characters, so at least three tokens
    cut = generator.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True, stop_strings=(stop,)))[0]
    assert cut.finish_reason == "stop_string"
    assert cut.text == free[: free.index(stop)]
    assert 3 <= len(cut.token_ids) < 40
    # Not before the least number of tokens.
    late = SamplingParams(max_new_tokens=40, min_new_tokens=40, ignore_eos=True, stop_strings=(stop,))
    assert len(generator.generate([prompt], late)[0].token_ids) == 40


def test_stop_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    generator = Generator(model, tokenizer)
    prompt = random_prompts(1, 2)[0]
    free = generator.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))[0].token_ids
    own = generator.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(free[5],)))[0]
    first = free.index(free[5])
    assert own.token_ids == free[: first + 1]
    assert (own.finish_reason, own.text) == ("stop", tokenizer.decode(free[:first]))


def test_a_stream_may_be_left(model: LlamaForCausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    sizes = prefilled(model, monkeypatch)
    stream = Generator(model, tokenizer).stream([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(sizes) < 10
    assert model.training  # as it was
    assert not torch.is_inference_mode_enabled()
    model.eval()


def test_no_gradients_and_no_leftovers(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    generator = Generator(model, tokenizer)
    for _ in generator.stream([1, 2, 3], SamplingParams(max_new_tokens=3)):
        assert not torch.is_inference_mode_enabled()  # the caller's code is not in our mode
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "prompt 0 is empty"),
        ([[1], [256]], GREEDY, "prompt 1 holds token id 256 and the model has ids 0 to 255"),
        ([[-1]], GREEDY, "token id -1"),
        ([[1] * 250], GREEDY, "250 tokens and max_new_tokens is 16.*max_position_embeddings, 256"),
        ([[1], [2]], [GREEDY], "2 prompts and 1 sampling parameters"),
    ],
)
def test_refusals(prompts: Any, params: Any, message: str, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match=message):
        Generator(model, tokenizer).generate(prompts, params)
    if len(prompts) == 1:
        with pytest.raises(GenerationError, match=message):
            Generator(model, tokenizer).stream(prompts[0], params)


def test_more_refusals(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="more memory"):
        Generator(model, tokenizer, max_cache_tokens=20).generate([[1] * 10], GREEDY)
    with pytest.raises(GenerationError, match="max_batch_size is 0"):
        Generator(model, tokenizer, max_batch_size=0)
    assert Generator(model, tokenizer).generate([], GREEDY) == []
    whole = Generator(model, tokenizer).generate([[1] * 240], replace(GREEDY, ignore_eos=True))[0]
    assert len(whole.token_ids) == 16  # to the very last position


def test_broken_weights_are_reported(tokenizer: Tokenizer) -> None:
    broken = LlamaForCausalLM(CONFIG)
    broken.init_weights()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match="no finite numbers"):
        Generator(broken, tokenizer).generate([[1]], GREEDY)


# The parts.


def test_common_prefix() -> None:
    for a, b in itertools.product([[], [1], [1, 2, 3], [1, 2, 4, 5], [2, 2, 3], [1, 2, 3, 4, 5, 6]], repeat=2):
        expected = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
        assert common_prefix(a, b) == expected


def test_split_jobs() -> None:
    jobs = [PrefillJob(row, row, list(range(size)), True) for row, size in enumerate([3, 10, 4, 2, 5])]
    batches = list(split_jobs(jobs, 6))
    assert all(0 < sum(len(job.tokens) for job in batch) <= 6 for batch in batches)
    for job in jobs:
        parts = [part for batch in batches for part in batch if part.row == job.row]
        assert [token for part in parts for token in part.tokens] == job.tokens
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[0].start == job.start
        assert all(b.start == a.start + len(a.tokens) for a, b in itertools.pairwise(parts))
    assert MIN_SHARED_TOKENS > 1


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
