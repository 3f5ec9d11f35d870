"""One model in several threads: what each gets is what it would get alone."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import arriero

TINY = "__internal_testing__/tiny-random-llama"
PROMPTS = ["Who goes there?", "The mule", "A load of salt and silver for the port", "Nine kings ride"]


@pytest.fixture(scope="module")
def model() -> arriero.Model:
    return arriero.load(TINY, device="cpu")


def calls(model: arriero.Model) -> list[Callable[[], Any]]:
    """One of each kind for each prompt, of different lengths so that they meet in the midst of each other."""
    made: list[Callable[[], Any]] = []
    for i, prompt in enumerate(PROMPTS):
        made += [
            lambda prompt=prompt, i=i: model.generate(prompt, max_new_tokens=20 + i).token_ids,  # type: ignore[misc]
            lambda prompt=prompt, i=i: model.chat(prompt, max_new_tokens=9 + i, temperature=0.9, seed=i),  # type: ignore[misc]
            lambda prompt=prompt: "".join(model.stream(prompt, max_new_tokens=24)),  # type: ignore[misc]
            lambda prompt=prompt: model.logits(prompt).tolist(),  # type: ignore[misc]
            lambda prompt=prompt: model.perplexity(prompt),  # type: ignore[misc]
            lambda prompt=prompt: arriero.evaluate(model, dataset_path=[{"src": prompt, "tgt": "mule"}]),  # type: ignore[misc]
        ]
    return made


def test_threads_get_what_one_alone_gets(model: arriero.Model) -> None:
    expected = [call() for call in calls(model)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert [done.result() for done in [pool.submit(call) for call in calls(model)]] == expected

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(call) for call in calls(model)))

    assert asyncio.run(together()) == expected
    assert model._engine.unfinished == 0


def test_an_open_stream_holds_nobody_up(model: arriero.Model) -> None:
    """Other threads come in between two pieces, and may read the stream themselves."""
    whole = model.generate(PROMPTS[0], max_new_tokens=24).text
    other = model.generate(PROMPTS[1], max_new_tokens=24).text
    stream = model.stream(PROMPTS[0], max_new_tokens=24)
    pieces = [next(stream)]
    with ThreadPoolExecutor(2) as pool:
        assert pool.submit(lambda: model.generate(PROMPTS[1], max_new_tokens=24).text).result(60) == other
        pieces.append(pool.submit(next, stream).result(60))
        pieces += stream
    assert "".join(pieces) == whole


def test_a_stream_that_is_left_ends(model: arriero.Model) -> None:
    """Also where the garbage collector finds it while the thread itself is in the midst of a step."""
    stream = model.stream(PROMPTS[0], max_new_tokens=24)
    next(stream)
    assert model._engine.unfinished == 1
    stream.close()
    assert model._engine.unfinished == 0
    assert list(stream) == []
    stream = model.stream(PROMPTS[0], max_new_tokens=24)
    with model.turns:
        del stream
        gc.collect()
        assert model._engine.unfinished == 1
    assert torch.equal(model.logits([1]), model.logits([1]))
    assert model._engine.unfinished == 0


def test_an_error_gives_the_turn_back(model: arriero.Model) -> None:
    with pytest.raises(arriero.GenerationError):
        model.generate([10**6])
    with pytest.raises(arriero.GenerationError):
        model.stream([10**6])
    thread = threading.Thread(target=model.generate, args=("a",), kwargs={"max_new_tokens": 1})
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
