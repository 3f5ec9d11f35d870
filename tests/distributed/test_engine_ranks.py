"""One engine over several processes: rank 0 decides, the others follow, and the answers are those of a lone process.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer
from layout_runs import append, read_lines, run_ranks

from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions
from arriero.engine.background import BackgroundEngine
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.loading import LoadedModel, load_for_inference
from arriero.engine.ranks import LeaderRunner, follow
from arriero.engine.runner import Runner, TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.errors import GenerationError, PeerError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.generation import for_generation
from arriero.parallel.processes import Processes, start, stop

TP, PP = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}
# name: processes, flags
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP),
    "pp2": (2, PP),
    "shards": (2, {"sharding": ["stage3"]}),
    "tp2 x pp2": (4, TP | PP),
    "tp4": (4, {"tensor_parallel_degree": 4}),
}
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large: distinct logits, and answers that repeat themselves now and then only
    "tie_word_embeddings": False,
}
PREFIX = 9  # more than a step of the smallest budget computes
SHARED = list(range(20, 80))
PROMPTS = [[1, 2, 3], [7], [*SHARED, 81], [5, 5, 5, 9, 200], [*SHARED, 3], [9, 8] * 20, SHARED]
NEW = 14
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = [SamplingParams(max_new_tokens=NEW, do_sample=True, temperature=1.2, top_p=0.9, seed=i) for i in range(7)]
FORM = SamplingParams(max_new_tokens=NEW, structure=Structure("regex", "[a-f]{3}-[0-9]{2,4}z"))


def write_model(folder: Path) -> None:
    """A model of random weights with one token a byte, and a prefix for it."""
    config = LlamaConfig.from_dict(MODEL)
    model = LlamaForCausalLM(config)
    model.init_weights(5)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    save_file(model.state_dict(), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(folder / "model")
    told = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder / "model"),
        "num_virtual_tokens": PREFIX,
        "num_layers": 4,
        "num_attention_heads": 2,
        "token_dim": 16,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    (folder / "prefix").mkdir()
    (folder / "prefix" / "adapter_config.json").write_text(json.dumps(told))
    values = torch.randn(PREFIX, 4 * 2 * 16, generator=torch.Generator().manual_seed(3))
    save_file({"prompt_embeddings": values}, folder / "prefix" / "adapter_model.safetensors")


# What rank 0 does with an engine. `make` gives a fresh one: runner, changes of its size, of the engine

Make = Callable[..., Engine]


def chunks(make: Make) -> Any:
    return [g.token_ids for g in make(max_running=4, max_step_tokens=8).generate(PROMPTS, GREEDY)]


def tiny_cache(make: Make) -> Any:
    engine = make(max_tokens=128, max_running=4)
    found = [g.token_ids for g in engine.generate(PROMPTS, GREEDY)]
    assert engine.scheduler.preemptions > 0
    return found


def guesses(make: Make) -> Any:
    """On and off by rank 0's clock, which no other process sees."""
    speculation = Speculation(PromptLookup(shortest=1), tokens=4, window=2, hold=1)
    engine = make(speculation=speculation, max_running=3)
    turns: set[bool] = set()
    measure = speculation.measure

    def noting(tokens: int, now: float | None = None) -> None:
        measure(tokens, now)
        turns.add(speculation.on)

    speculation.measure = noting  # type: ignore[method-assign]
    found = [g.token_ids for g in engine.generate(PROMPTS, GREEDY)]
    assert turns == {True, False}
    assert 0 < speculation.counters.accepted < speculation.counters.proposed
    return found


def drawn(make: Make) -> Any:
    return [g.token_ids for g in make(max_running=4).generate(PROMPTS, SAMPLED)]


def forms(make: Make) -> Any:
    texts = [g.text for g in make().generate(PROMPTS, FORM)]
    assert all(re.fullmatch("[a-f]{3}-[0-9]{2,4}z", text) for text in texts), texts
    return texts


def eight_bits(make: Make) -> Any:
    """Keys and values in int8; each process rounds those of its heads."""
    return chunks(make)


def cancelled(make: Make) -> Any:
    engine = make(max_running=3, max_step_tokens=8)
    answers = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(12):
        engine.step()
    engine.cancel(answers[0])
    engine.cancel(answers[3])
    while engine.unfinished:
        engine.step()
    assert answers[3].finish_reason == "cancelled"
    return [answer.token_ids for answer in answers if answer.finish_reason != "cancelled"]


def background(make: Make) -> Any:
    engine = BackgroundEngine(make(max_running=4, max_step_tokens=16))
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = engine.submit(PROMPTS[index], GREEDY).result().token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    gone = engine.submit(SHARED, SamplingParams(max_new_tokens=100))
    gone.cancel()
    assert gone.result().finish_reason == "cancelled"
    for thread in threads:
        thread.join()
    assert engine.close(drain=True)
    return [found[i] for i in range(len(PROMPTS))]


WAYS: dict[str, Callable[[Make], Any]] = {
    way.__name__: way for way in (chunks, tiny_cache, guesses, drawn, forms, eight_bits, cancelled, background)
}


def answers_of(folder: Path, processes: Processes, loaded: LoadedModel, way: str) -> Any:
    """What a way comes to; None in the processes that follow."""
    sizes: dict[str, Any] = {"max_tokens": 640}
    if way == "tiny_cache":
        sizes = {"max_tokens": 128}
    elif way == "eight_bits":
        sizes["kv_cache_dtype"] = "int8"
    runner = TorchRunner(for_generation(loaded.model), **sizes)
    if not processes.first:
        follow(runner, processes)
        return None

    def make(used: Runner) -> Make:
        def engine(max_tokens: int = 0, **options: Any) -> Engine:
            return Engine(used, loaded.tokenizer, **options)

        return engine

    if processes.alone:
        return WAYS[way](make(runner))
    with LeaderRunner(runner, processes) as leader:
        return WAYS[way](make(leader))


def load(folder: Path, processes: Processes, prefix: bool = False) -> LoadedModel:
    return load_for_inference(
        ModelOptions(model_name_or_path=str(folder / "model"), device="cpu", dtype="float32"),
        AdapterPathOptions(prefix_path=str(folder / "prefix") if prefix else None),
        processes,
    )


# The ways on each layout, with and without a prefix; in `make test`, those in which the layout has a part.
WITH_PREFIX = ("chunks", "tiny_cache", "guesses")
EVERY = {name: (tuple(WAYS), WITH_PREFIX) for name in LAYOUTS}
SOME = {
    "tp2": (tuple(WAYS), WITH_PREFIX),
    "pp2": (("chunks", "guesses", "eight_bits", "background"), ("tiny_cache",)),
    "shards": (("tiny_cache", "cancelled"), ()),
}


def answer_all(folder: Path, name: str, processes: Processes, part: dict[str, Any]) -> None:
    for prefix, ways in enumerate(part[name]):
        loaded = load(folder, processes, bool(prefix))
        for way in ways:
            found = answers_of(folder, processes, loaded, way)
            if processes.first:
                append(folder / "answers.jsonl", {"layout": name, "prefix": bool(prefix), "way": way, "found": found})


# Faults


class Broken:
    """A runner that goes wrong in a step: before its forward pass, or after."""

    def __init__(self, runner: TorchRunner, at: int, *, after: bool, error: BaseException) -> None:
        self._runner, self._at, self._after, self._error, self._steps = runner, at, after, error, 0
        for name in (
            "num_blocks",
            "block_size",
            "vocab_size",
            "context",
            "prefix_length",
            "reuses",
            "adapters",
            "library",
            "device",
        ):
            setattr(self, name, getattr(runner, name))

    def begin(self, *given: Any) -> None:
        self._runner.begin(*given)

    def run(self, work: Sequence[Work]) -> Tensor:
        self._steps += 1
        now = self._steps == self._at
        if now and not self._after:
            self._raise()
        logits = self._runner.run(work)
        if now:
            self._raise()
        return logits

    def _raise(self) -> None:
        if isinstance(self._error, KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGKILL)
        raise self._error


# name: which ranks, before or after the forward pass
FAILURES: dict[str, tuple[tuple[int, ...], bool]] = {
    "in all": ((0, 1), False),
    "in rank 0, after the forward pass": ((0,), True),
}


def go_on(folder: Path, name: str, processes: Processes) -> None:
    """A step fails; the requests that ran fail with it, and the next ones are answered."""
    loaded = load(folder, processes)
    for ranks, after in FAILURES.values():
        runner: Any = TorchRunner(for_generation(loaded.model), max_tokens=640)
        if processes.rank in ranks:
            runner = Broken(runner, 4, after=after, error=MemoryError("no memory left"))
        if not processes.first:
            follow(runner, processes)
            continue
        with LeaderRunner(runner, processes) as leader:
            engine = BackgroundEngine(Engine(leader, loaded.tokenizer))
            with pytest.raises(GenerationError, match="no memory left"):
                engine.submit(PROMPTS[0], GREEDY).result()
            found = engine.submit(PROMPTS[2], GREEDY).result().token_ids
            engine.close()
        append(folder / "after.jsonl", {"found": found})


def end(folder: Path, what: str, processes: Processes) -> None:
    """A process fails alone, or is killed; every other ends by itself."""
    loaded = load(folder, processes)
    runner: Any = TorchRunner(for_generation(loaded.model), max_tokens=640)
    if what == "killed" and processes.rank == processes.size - 1:
        runner = Broken(runner, 4, after=False, error=KeyboardInterrupt())
    if what == "alone" and processes.rank == 1:
        runner = Broken(runner, 4, after=False, error=MemoryError("no memory left"))
    if what == "leader alone" and processes.first:
        runner = Broken(runner, 4, after=False, error=MemoryError("no memory left"))
    began = time.monotonic()
    try:
        if processes.first:
            with LeaderRunner(runner, processes, grace=2) as leader:
                engine = BackgroundEngine(Engine(leader, loaded.tokenizer))
                tickets = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
                failures = []
                for ticket in tickets:
                    with pytest.raises(GenerationError) as failed:
                        ticket.result()
                    failures.append(str(failed.value))
                with pytest.raises(GenerationError, match="process"):  # it takes no more
                    engine.submit(PROMPTS[0], GREEDY).result()
                assert engine.failure is not None
                append(folder / "ends.jsonl", {"rank": 0, "failures": failures})
                raise engine.failure
        follow(runner, processes, grace=2)
    except (PeerError, MemoryError) as error:
        told = {"rank": processes.rank, "kind": type(error).__name__, "said": str(error)}
        append(folder / "ends.jsonl", told | {"seconds": time.monotonic() - began})
    os._exit(0)


def wait_idle(folder: Path, processes: Processes) -> None:
    loaded = load(folder, processes)
    runner = TorchRunner(for_generation(loaded.model), max_tokens=640)
    if not processes.first:
        follow(runner, processes)
        return
    with LeaderRunner(runner, processes) as leader:
        engine = BackgroundEngine(Engine(leader, loaded.tokenizer))
        first = engine.submit(PROMPTS[2], GREEDY).result()
        time.sleep(4.5)
        again = engine.submit(PROMPTS[2], GREEDY).result()
        engine.close()
    append(folder / "idle.jsonl", {"found": [first.token_ids, again.token_ids]})


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if what in ("idle", "killed", "alone", "leader alone"):
        os.environ["ARRIERO_TIMEOUT"] = {"idle": "3", "leader alone": "6"}.get(what, "40")
        processes = start(ParallelOptions(**(TP | PP if world == 4 else TP)).layout(world), torch.device("cpu"))
        if what == "idle":
            wait_idle(folder, processes)
        else:
            end(folder, what, processes)
    else:
        for name, (size, flags) in LAYOUTS.items():
            if size == world:
                processes = start(ParallelOptions(**flags).layout(world), torch.device("cpu"))
                if what == "go on":
                    go_on(folder, name, processes)
                else:
                    answer_all(folder, name, processes, SOME if what == "some answers" else EVERY)
    stop(processes)


# The tests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


def alone(folder: Path, prefix: bool, way: str) -> Any:
    return answers_of(folder, Processes(), load(folder, Processes(), prefix), way)


def check_answers(folder: Path, world: int, part: dict[str, Any]) -> None:
    run_ranks(world, Path(__file__), "some answers" if part is SOME else "answers", str(folder))
    lines = read_lines(folder / "answers.jsonl")
    ways = [part[name] for name, (size, _) in LAYOUTS.items() if size == world]
    assert len(lines) == sum(len(plain) + len(with_prefix) for plain, with_prefix in ways)
    expected = {(line["prefix"], line["way"]): None for line in lines}
    for prefix, way in expected:
        expected[prefix, way] = alone(folder, prefix, way)
    for line in lines:
        assert line["found"] == expected[line["prefix"], line["way"]], line
    # chunks, guesses, lost blocks and company change nothing
    for prefix in (False, True):
        assert expected[prefix, "chunks"] == expected[prefix, "tiny_cache"] == expected[prefix, "guesses"]
    assert expected[False, "chunks"] == expected[False, "background"] != expected[True, "chunks"]
    assert expected[False, "eight_bits"] != expected[False, "chunks"], "nothing was rounded"


@pytest.mark.timeout(300)
def test_two_processes_answer_as_one(folder: Path) -> None:
    check_answers(folder, 2, SOME)


@pytest.mark.peers
@pytest.mark.timeout(500)
@pytest.mark.parametrize("world", [2, 4])
def test_they_answer_as_one_in_every_way(world: int, folder: Path) -> None:
    check_answers(folder, world, EVERY)


def test_processes_go_on_after_a_step_that_failed(folder: Path) -> None:
    run_ranks(2, Path(__file__), "go on", str(folder))
    expected = alone(folder, False, "chunks")[2]
    lines = read_lines(folder / "after.jsonl")
    assert [line["found"] for line in lines] == [expected] * len(lines)
    assert len(lines) == len(FAILURES) * 3


def test_idle_processes_are_not_given_up(folder: Path) -> None:
    """4.5 s without a request, where 3 s of silence end a process."""
    run_ranks(2, Path(__file__), "idle", str(folder))
    expected = alone(folder, False, "chunks")[2]
    assert read_lines(folder / "idle.jsonl")[0]["found"] == [expected] * 2


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.peers)])
def test_a_killed_process_ends_all(world: int, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0"):  # one of them was killed, which is no good end
        run_ranks(world, Path(__file__), "killed", str(folder))
    lines = read_lines(folder / "ends.jsonl")
    assert [line["rank"] for line in lines if "failures" in line] == [0]
    ends = {line["rank"]: line for line in lines if "said" in line}
    assert ends.keys() == {*range(world - 1)}
    for line in ends.values():
        assert line["kind"] == "PeerError"
        assert line["said"].startswith("another process of this run ended or does not answer")
        assert "\n" not in line["said"]
        assert line["seconds"] < 20, "it waited for the time limit"


@pytest.mark.parametrize("what", ["alone", "leader alone"])
def test_a_step_that_fails_in_one_process_ends_all(what: str, folder: Path) -> None:
    run_ranks(2, Path(__file__), what, str(folder))
    lines = read_lines(folder / "ends.jsonl")
    failures = next(line["failures"] for line in lines if "failures" in line)
    assert len(failures) == len(PROMPTS)
    ends = {line["rank"]: line for line in lines if "said" in line}
    assert ends.keys() == {0, 1}
    assert max(line["seconds"] for line in ends.values()) < 20
    if what == "alone":
        assert (ends[1]["kind"], ends[1]["said"]) == ("MemoryError", "no memory left")
    assert ends[0]["said"].startswith("another process of this run ended or does not answer")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
