"""The engine's thread: any number of threads and event loops hand in, read, cancel and leave."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.background import BackgroundEngine
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.ticket import EngineClosedError, RefusedError
from arriero.errors import GenerationError, PeerError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer

PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    model.init_weights(3)
    return model


@pytest.fixture
def background(model: LlamaForCausalLM, tokenizer: Tokenizer) -> Iterator[BackgroundEngine]:
    engine = BackgroundEngine(Engine(TorchRunner(model, max_tokens=320), tokenizer, max_running=4, max_step_tokens=16))
    yield engine
    engine.close()


def alone(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    [answer] = Engine(TorchRunner(model, max_tokens=256), tokenizer).generate([prompt], PARAMS)
    return answer.token_ids


def test_threads_and_event_loops_get_their_own_answers(
    background: BackgroundEngine, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    prompts = [[i, 2 * i, 7] for i in range(1, 13)]
    found: dict[int, list[int]] = {}

    def read(index: int) -> None:
        pieces = list(background.submit(prompts[index], PARAMS))
        found[index] = [token for piece in pieces for token in piece.token_ids]
        assert pieces[-1].result is not None
        assert "".join(piece.text for piece in pieces) == pieces[-1].result.text

    async def read_async(index: int) -> None:
        tokens: list[int] = []
        async for piece in background.submit(prompts[index], PARAMS):
            tokens += piece.token_ids
        found[index] = tokens

    async def read_several() -> None:
        await asyncio.gather(*(read_async(index) for index in range(6, 12)))

    threads = [threading.Thread(target=read, args=(index,)) for index in range(6)]
    threads.append(threading.Thread(target=lambda: asyncio.run(read_several())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {index: alone(model, tokenizer, prompt) for index, prompt in enumerate(prompts)}


def test_a_refusal_is_that_requests_alone(background: BackgroundEngine) -> None:
    good, bad = background.submit([1, 2], PARAMS), background.submit([], PARAMS)
    with pytest.raises(GenerationError, match="the prompt is empty"):
        bad.result()
    assert len(good.result().token_ids) == 12


def test_cancelling_ends_the_iteration_and_frees_the_blocks(background: BackgroundEngine) -> None:
    ticket = background.submit([1, 2, 3], SamplingParams(max_new_tokens=100))
    pieces = iter(ticket)
    next(pieces)
    ticket.cancel()
    rest = list(pieces)
    assert rest[-1].result is not None
    assert rest[-1].result.finish_reason == "cancelled"
    ticket.cancel()  # once more does no harm
    assert background.submit([5], PARAMS).result().finish_reason == "length"
    assert background.engine.blocks.used == 0


def test_what_a_step_raises_fails_its_requests_and_the_engine_goes_on(
    background: BackgroundEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = background.engine.runner.run

    def broken(work: Sequence[Work]) -> torch.Tensor:
        monkeypatch.setattr(background.engine.runner, "run", run)
        raise RuntimeError("out of\n memory")

    monkeypatch.setattr(background.engine.runner, "run", broken)
    with pytest.raises(GenerationError, match=r"the step could not be computed \(out of memory\)"):
        background.submit([1, 2], PARAMS).result()
    assert len(background.submit([1, 2], PARAMS).result().token_ids) == 12
    background.engine.blocks.check([])


def test_closing_drains_or_cancels(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    for drain, reason in ((True, "length"), (False, "cancelled")):
        background = BackgroundEngine(Engine(TorchRunner(model, max_tokens=256), tokenizer))
        ticket = background.submit([1], SamplingParams(max_new_tokens=100))
        next(iter(ticket))
        assert background.close(drain=drain, timeout=60)
        assert ticket.result().finish_reason == reason
        with pytest.raises(GenerationError, match="shutting down"):
            background.submit([1], PARAMS)


def test_closing_waits_no_longer_than_it_is_told(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    background = BackgroundEngine(Engine(TorchRunner(model, max_tokens=1024), tokenizer, max_running=1))
    tickets = [background.submit([i], SamplingParams(max_new_tokens=120)) for i in range(1, 9)]
    assert not background.close(drain=True, timeout=0.05)
    assert {ticket.result().finish_reason for ticket in tickets} <= {"length", "cancelled"}


@pytest.mark.parametrize("first", [True, False])
def test_closing_again_waits_for_nothing(first: bool, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """After the engine's thread has ended, and while others close it too; it tells the same as the first time."""
    background = BackgroundEngine(Engine(TorchRunner(model, max_tokens=256), tokenizer))
    ticket = background.submit([1], SamplingParams(max_new_tokens=100))
    next(iter(ticket))
    background.close(drain=first, timeout=60)
    again: Future[bool] = Future()
    threading.Thread(target=lambda: again.set_result(background.close(drain=True)), daemon=True).start()
    assert again.result(timeout=30) == first
    assert background.close()
    together = BackgroundEngine(Engine(TorchRunner(model, max_tokens=256), tokenizer))
    ticket = together.submit([1], SamplingParams(max_new_tokens=100))
    ends: list[Future[bool]] = [Future() for _ in range(6)]
    for number, end in enumerate(ends):
        drain = first or number > 2
        threading.Thread(
            target=lambda end=end, drain=drain: end.set_result(together.close(drain=drain)), daemon=True
        ).start()
    finished = [end.result(timeout=30) for end in ends]
    reason = ticket.result().finish_reason
    assert reason == "length" or not first
    assert finished[3:] == [reason == "length"] * 3


def test_long_things_take_turns_with_the_steps(background: BackgroundEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait: one of them between two steps, in their order, and none that was taken back."""
    done: list[str] = []
    held = threading.Event()
    step = background.engine.step

    def noted() -> list[Any]:
        done.append("step")
        return step()

    monkeypatch.setattr(background.engine, "step", noted)
    hold = threading.Thread(target=background.call, args=(lambda _: held.wait(20),))
    hold.start()
    ticket = background.submit([1], SamplingParams(max_new_tokens=8, ignore_eos=True))

    def turn(name: str) -> Future[int]:
        return background.take_turn(lambda engine: (done.append(name), engine.unfinished)[1])

    turns = [turn(str(number)) for number in range(4)]
    assert turns[1].cancel()
    held.set()
    assert ticket.result().finish_reason == "length"
    hold.join()
    assert done == ["0", "step", "2", "step", "3", *["step"] * 6]
    assert [turns[number].result() for number in (0, 2, 3)] == [1, 1, 1]
    assert turn("alone").result() == 0  # and without any steps

    def broken(_: Engine) -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        background.take_turn(broken).result()


def test_turns_end_with_the_engine(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Those that wait, those that come late, and with `drain` none that was there before."""
    for drain in (False, True):
        background = BackgroundEngine(Engine(TorchRunner(model, max_tokens=256), tokenizer))
        begun, held = threading.Event(), threading.Event()

        def hold(_: Engine, begun: threading.Event = begun, held: threading.Event = held) -> None:
            begun.set()
            held.wait(20)

        turns = [background.take_turn(hold), background.take_turn(lambda _: None)]
        assert begun.wait(20)
        closing = threading.Thread(target=background.close, kwargs={"drain": drain})
        closing.start()
        time.sleep(0.05)
        held.set()
        closing.join(20)
        assert turns[0].exception(20) is None
        assert isinstance(turns[1].exception(20), type(None) if drain else EngineClosedError)
        with pytest.raises(EngineClosedError, match="shutting down"):
            background.take_turn(lambda _: None)


def test_a_defect_is_told_to_those_whose_turn_has_not_come(
    background: BackgroundEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    def broken() -> list[Any]:
        raise PeerError("process 1 is gone")

    monkeypatch.setattr(background.engine, "step", broken)
    hold = threading.Thread(target=background.call, args=(lambda _: held.wait(20),))
    hold.start()
    ticket = background.submit([1], PARAMS)
    turns = [background.take_turn(lambda _: 1) for _ in range(2)]
    held.set()
    hold.join()
    assert turns[0].result(20) == 1
    with pytest.raises(GenerationError, match="process 1 is gone"):
        turns[1].result(20)
    with pytest.raises(GenerationError, match="process 1 is gone"):
        ticket.result()
    with pytest.raises(EngineClosedError, match="process 1 is gone"):
        background.take_turn(lambda _: 1)


@pytest.mark.parametrize("events", [400, pytest.param(10_000, marks=[pytest.mark.peers, pytest.mark.timeout(1800)])])
def test_random_lives_leave_nothing_behind(background: BackgroundEngine, events: int) -> None:
    chance = random.Random(0)
    alive = []
    for _ in range(events):
        kind = chance.random()
        if kind < 0.5 or not alive:
            prompt = [7] * (16 * chance.randrange(2)) + [chance.randrange(256) for _ in range(chance.randint(1, 20))]
            alive.append(background.submit(prompt, SamplingParams(max_new_tokens=chance.randint(1, 12))))
        elif kind < 0.75:
            alive.pop(chance.randrange(len(alive))).cancel()
        elif kind < 0.95:
            alive.pop(0).result()
        else:
            time.sleep(0.001)
    for ticket in alive:
        ticket.result()
    assert background.close(drain=True, timeout=60)
    engine = background.engine
    engine.blocks.check([])
    assert engine.blocks.available == engine.blocks.num_blocks
    assert not engine.unfinished
    assert not engine._answers
    assert not background._tickets
    assert not background._answers
    assert not background._sent


def test_a_server_knows_whose_fault_it_is(background: BackgroundEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an answer has begun: taken, refused, broken."""

    async def run() -> None:
        good = background.submit([1, 2], PARAMS)
        await good.taken()
        assert len((await good.wait()).token_ids) == 12
        await good.taken()  # later too
        for prompt in ([], [999], [1] * 200):
            with pytest.raises(RefusedError):
                await background.submit(prompt, PARAMS).taken()
        monkeypatch.setattr(background.engine.runner, "run", lambda work: 1 / 0)
        with pytest.raises(GenerationError) as broken:
            await background.submit([3], PARAMS).wait()
        assert not isinstance(broken.value, RefusedError | EngineClosedError)

    asyncio.run(run())
    background.close()
    with pytest.raises(EngineClosedError):
        background.submit([1], PARAMS)


def test_pieces_have_the_log_probabilities_of_their_tokens(background: BackgroundEngine) -> None:
    params = SamplingParams(max_new_tokens=9, logprobs=2, prompt_logprobs=0, n=2, do_sample=True, seed=1)
    pieces = list(background.submit([5, 6, 7], params))
    for index in range(2):
        own = [piece for piece in pieces if piece.index == index]
        result = own[-1].result
        assert result is not None
        assert tuple(one for piece in own for one in piece.logprobs) == result.logprobs
        assert tuple(token for piece in own for token in piece.token_ids) == tuple(result.token_ids)
        assert own[0].prompt_logprobs == result.prompt_logprobs
        assert not any(piece.prompt_logprobs for piece in own[1:])
    assert len(pieces[0].prompt_logprobs) == 3


def test_a_defect_of_the_engine_is_told_to_all_who_wait(
    background: BackgroundEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to whoever runs it: `failure`."""
    waiting = [background.submit([i], SamplingParams(max_new_tokens=100)) for i in range(1, 4)]
    next(iter(waiting[0]))
    monkeypatch.setattr(background.engine, "step", lambda: 1 / 0)
    monkeypatch.setattr(background.engine, "fail_running", lambda error: 1 / 0)
    for ticket in waiting:
        with pytest.raises(GenerationError):
            ticket.result()
    assert "the engine has failed" in str(background.failure)
    with pytest.raises(EngineClosedError, match="the engine has failed"):
        background.submit([1], PARAMS)
