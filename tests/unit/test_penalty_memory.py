"""What penalties and seeds hold of each answer: nothing as long as the vocabulary while the answer waits or has ended."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arriero.data.tokenizer import load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling import sampler_of
from arriero.engine.sampling_params import SamplingParams
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer
from tiny_llama import tiny_config

VOCABULARY = 777  # a length that no other tensor here has
PARAMS = SamplingParams(max_new_tokens=30, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4)
RUNNING = 3


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """In float64, so that no two logits of an answer are as close as a batch's rounding."""
    model = LlamaForCausalLM(tiny_config(vocab_size=VOCABULARY, initializer_range=0.3)).eval()
    model.init_weights(7)
    return model.double()


@pytest.fixture
def engine(model: LlamaForCausalLM, tmp_path: Path) -> Engine:
    """With room for the keys and values of less than two whole answers."""
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path))
    return Engine(TorchRunner(model, block_size=4, max_tokens=56), tokenizer, max_running=RUNNING)


@pytest.fixture
def made_here() -> Iterator[None]:
    """Only what comes from now on is looked through for tensors."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def arrays() -> int:
    """Tensors with a place for each token."""
    gc.collect()
    return sum(type(it) is torch.Tensor and it.shape == (VOCABULARY,) for it in gc.get_objects())


def expected(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    """The likeliest tokens by whole forward passes and the formulas of OpenAI's API and of CTRL (arXiv:1909.05858)."""
    answer: list[int] = []
    for _ in range(PARAMS.max_new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer]))[0, -1].tolist()
        for token, count in Counter(answer).items():
            scores[token] -= count * PARAMS.frequency_penalty + PARAMS.presence_penalty
        for token in {*prompt, *answer}:
            factor = PARAMS.repetition_penalty
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
        answer.append(max(range(VOCABULARY), key=scores.__getitem__))
    return answer


def test_only_what_runs_counts_tokens_and_answers_that_lost_their_place_are_the_same(
    engine: Engine, model: LlamaForCausalLM, made_here: None
) -> None:
    prompts = [[i, 2 * i + 1, 300 + i, i] for i in range(1, 7)]
    groups = [engine.submit_group(prompt, PARAMS) for prompt in prompts]
    assert arrays() == 0
    most = 0
    while engine.unfinished:
        engine.step()
        assert arrays() <= 2 * len(engine.scheduler.running), "what waits, preempted or not, holds none"
        most = max(most, arrays())
    assert most == 2 * RUNNING, "the tensors are found"
    assert engine.scheduler.preemptions > 2
    assert [group.answers[0].token_ids for group in groups] == [expected(model, prompt) for prompt in prompts]
    assert arrays() == 0, "an answer that is kept holds none"


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_state_of_an_answer_that_waits_is_as_long_as_its_prompt(library: str) -> None:
    sampler = sampler_of(library, "cpu")  # type: ignore[arg-type]
    sampler.start(PARAMS, [1, 2, 3], [4], 1000)
    tracemalloc.start()
    try:
        rows = [sampler.start(PARAMS, [1, 2, 3], [4], 1_000_000) for _ in range(8)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 8
    assert peak < 100_000, "bytes"
