"""What `bench` counts, times and says."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from arriero.config.bench import ENGINE_WORKLOADS, BenchOptions
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.benchmark import measured, report
from arriero.engine.benchmark.measured import Job, Run, Step, run_job
from arriero.engine.benchmark.peer import PeerRun, peer
from arriero.engine.benchmark.record import Comparison, Latency, Peak, Record, shared_work
from arriero.engine.benchmark.rounds import measure
from arriero.engine.benchmark.work_cost import Piece, WorkCost
from arriero.engine.benchmark.workloads import Prompts, cuts, make_jobs
from arriero.engine.runner import TorchRunner
from arriero.engine.scheduler import Scheduler
from arriero.engine.torch_sampling import TorchSampler
from arriero.errors import ConfigError, GenerationError
from arriero.formats import hf
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

Call = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=640,
    initializer_range=0.3,
)
PEAK = Peak(1e9, 1e9)


def network(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config).eval()
    model.init_weights(1)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return network()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    hf.save_model(model, CONFIG, path, extra_files=tiny_tokenizer_files())
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def runner(model: LlamaForCausalLM) -> TorchRunner:
    return TorchRunner(model, max_tokens=40_000)


def job(count: int, length: int, new: int, running: int, **more: Any) -> Job:
    prompts = [[(7 * i + 3 * j) % 2000 + 3 for j in range(length)] for i in range(count)]
    return Job("decode", "a case", prompts, [new] * count, running, **more)


# Counts


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_linear_layers_are_what_torch_counts(tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    model, length = network(config), 21
    for layer in model.model.layers:
        layer.self_attn.backend = "reference"  # which torch can count
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    cost = WorkCost.of(model)
    assert cost.per_token * length + cost.per_logit_row * length == linear
    # of attention torch counts all pairs, seen or not
    attention = sum(counted.values()) - linear
    assert cost.per_pair * 3 * length * length == attention > 0


@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_pairs_and_keys_are_those_of_the_mask(window: int | None) -> None:
    layers: dict[str, Any] = {"model_type": "mistral", "sliding_window": window} if window else {}
    cost = WorkCost.of(network(replace(CONFIG, layer_types=(), **layers)))
    for start in (0, 1, 4, 5, 30):
        for count in (1, 2, 5, 12):
            seen = [
                {key for key in range(query + 1) if window is None or query - key < window}
                for query in range(start, start + count)
            ]
            piece = Piece(start, count, 1)
            pairs = 3 * sum(map(len, seen))
            keys = 3 * len(set().union(*seen))
            assert cost.flops([piece]) == cost.per_token * count + cost.per_logit_row + cost.per_pair * pairs
            # two numbers of fp32 for each head's dimension: 2 x 2 heads x 8 x 4 bytes
            assert cost.bytes([piece]) == cost.weight_bytes + keys * 2 * 2 * 8 * 4
    assert cost.bytes([piece, piece]) - cost.bytes([piece]) == keys * 128


def test_keys_in_eight_bits_are_fewer_bytes(model: LlamaForCausalLM) -> None:
    cost = WorkCost.of(model, "int8")  # with a scale of 4 bytes for each head
    assert cost.bytes([Piece(0, 10, 1)]) == cost.weight_bytes + 3 * 10 * 2 * 2 * (8 + 4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_that_are_read_are_those_of_the_file(tied: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    model = network(config)
    hf.save_model(model, config, tmp_path / "model", extra_files=tiny_tokenizer_files())
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        sizes = {name: 4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not tied:
        sizes.pop("model.embed_tokens.weight")  # of which a step reads some rows
    assert WorkCost.of(model).weight_bytes == sum(sizes.values())
    assert WorkCost.of(model.bfloat16()).weight_bytes == sum(sizes.values()) // 2


# Runs


def test_steps_tokens_and_gaps_of_a_job(runner: TorchRunner, tokenizer: Tokenizer) -> None:
    run = run_job(runner, tokenizer, job(4, 20, 6, 4), max_step_tokens=32)
    assert [len(answer) for answer in run.answers] == [6] * 4
    assert (len(run.first_tokens), len(run.gaps)) == (4, 4 * 5)
    assert run.computed_tokens == 4 * 20 + 4 * 5  # the last token of an answer is never computed
    assert sum(step.given for step in run.steps) == 4 * 6
    assert max(sum(piece.count for piece in step.pieces) for step in run.steps) <= 32
    going_on = [step for step in run.steps if not step.prompts]
    assert all(len(step.pieces) == step.given for step in going_on)
    assert all(piece.count == 1 for step in going_on for piece in step.pieces)
    assert sum(piece.count for step in run.steps if step.prompts for piece in step.pieces) >= 4 * 20
    assert sum(step.seconds for step in run.steps) <= run.seconds
    alone = run_job(runner, tokenizer, job(4, 20, 6, 4))
    assert [step.prompts for step in alone.steps] == [True] + [False] * 5
    assert alone.answers == run.answers


def slow(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, seconds: float) -> None:
    original = getattr(kind, method)

    def later(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **named)

    monkeypatch.setattr(kind, method, later)


def test_time_goes_to_what_took_it(runner: TorchRunner, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = 0.5
    for kind, method in ((TorchRunner, "run"), (TorchSampler, "__call__"), (Scheduler, "schedule")):
        with monkeypatch.context() as patch:
            slow(patch, kind, method, wait)
            run = run_job(runner, tokenizer, job(2, 5, 2, 1))
        assert len(run.steps) == 4  # one request at a time
        for step in run.steps:
            rest = step.seconds - step.model_seconds - step.sampling_seconds
            spent = {TorchRunner: step.model_seconds, TorchSampler: step.sampling_seconds, Scheduler: rest}
            assert spent.pop(kind) >= wait
            assert max(spent.values()) < wait
        assert (run.scheduler_share > 0.5) == (kind is Scheduler)
        first, second = run.first_tokens
        assert wait <= first < 2 * wait
        assert 3 * wait <= second < 4 * wait  # it waits for the other's two steps
        assert all(wait <= gap < 2 * wait for gap in run.gaps)


def test_a_shared_beginning_is_computed_once(runner: TorchRunner, tokenizer: Tokenizer) -> None:
    """The goal of the engine: at least 5 times less work for 32 prompts of which 512 tokens are the same."""
    prompts = Prompts.of(tokenizer, 2048, runner.context, 0)
    options = BenchOptions(workloads=["shared_prefix"], max_new_tokens=3)
    (shared,) = make_jobs(options, prompts)
    assert (len(shared.prompts), {len(prompt) for prompt in shared.prompts}) == (32, {528})
    with_cache, without = (run_job(runner, tokenizer, replace(shared, prefix_cache=on)) for on in (True, False))
    found = shared_work(shared, with_cache, without)
    assert (found.computed_without, found.computed_with) == (32 * 528, 512 + 32 * 16)
    assert found.work_ratio == 16.5 >= 5
    assert with_cache.answers == without.answers


def test_a_broken_model_is_an_error(tokenizer: Tokenizer) -> None:
    broken = network()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(GenerationError, match="no finite numbers"):
        run_job(TorchRunner(broken, max_tokens=1000), tokenizer, job(2, 5, 4, 2))


# Figures


def step(seconds: float, count: int, *, prompts: bool, pieces: int = 1) -> Step:
    return Step(seconds, 0.8 * seconds, 0.1 * seconds, (Piece(0, count, 1),) * pieces, pieces, prompts)


def hand_made(seconds: float) -> Run:
    """A prompt of 10 tokens in half the time, then two steps of two answers."""
    steps = [step(seconds / 2, 10, prompts=True)] + [step(seconds / 4, 1, prompts=False, pieces=2)] * 2
    return Run(seconds, [seconds / 2, seconds], [seconds / 4] * 4, steps, [[1, 2], [3, 4]], 0)


def test_rates_are_medians_over_the_runs() -> None:
    cost = WorkCost(1e6, 1e3, 10.0, 500, 7, (None, None))
    given = replace(job(2, 10, 2, 2), prompts=[[1] * 10, [2] * 10])
    record = Record.of(given, [hand_made(s) for s in (4.0, 1.0, 2.0)], cost, Peak(1e8, 2e4))
    assert record.seconds == 2.0
    assert record.output_tokens_per_second == 2.0
    assert record.total_tokens_per_second == 12.0
    assert record.scheduler_share == pytest.approx(0.1)
    assert record.sampling_share == pytest.approx(0.1)
    assert record.prompts is not None
    assert record.answers is not None
    assert (record.prompts.steps, record.answers.steps) == (1, 2)
    assert record.prompts.tokens_per_second == 10.0
    assert record.prompts.gflops == pytest.approx((10e6 + 1e3 + 10.0 * 2 * 55) / 1e9)
    assert record.prompts.peak_flops_share == pytest.approx(10.0 * record.prompts.gflops)
    assert record.answers.tokens_per_second == 4.0
    # twice in a second: the weights, and of two sequences one token in two layers
    assert record.answers.gigabytes == pytest.approx(2 * (500 + 2 * 2 * 7) / 1e9)
    assert record.answers.peak_bandwidth_share == pytest.approx(record.answers.gigabytes * 1e9 / 2e4)
    assert record.first_token == Latency(pytest.approx(1500.0), pytest.approx(3900.0))
    assert record.next_token is not None


def test_percentiles() -> None:
    assert Latency.of([i / 1000 for i in range(101)]) == Latency(pytest.approx(50.0), pytest.approx(99.0))
    assert Latency.of([]) is None


def test_a_comparison_is_of_neighbouring_rounds() -> None:
    ours = [hand_made(s) for s in (1.0, 2.0, 4.0)]
    theirs = [PeerRun(s, [[1, 2], [3, 5]]) for s in (3.0, 4.0, 20.0)]
    found = Comparison.of(ours, theirs)
    assert (found.ratio, found.ratios, found.seconds, found.equal_answers) == (3.0, (3.0, 2.0, 5.0), 4.0, 0.5)


def test_the_report_holds_what_was_measured(runner: TorchRunner, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    record = measure(runner, tokenizer, job(3, 9, 4, 3), WorkCost.of(model), PEAK, repeats=2)
    assert (record.runs, record.requests, record.prompt_tokens, record.output_tokens) == (2, 3, 27, 12)
    assert record.computed_prompt_tokens == 27
    setting = report.Setting("a model", 1, "float32", "cpu", "a machine", 1, PEAK, runner.kv_memory, 640)
    found = json.loads(json.dumps(report.as_dictionary(setting, [record]), allow_nan=False))
    assert found["workloads"][0]["output_tokens_per_second"] == pytest.approx(12 / record.seconds)
    assert found["kv_memory"]["token_bytes"] == 3 * 2 * 2 * 8 * 4
    assert setting.text().splitlines()[2].startswith("keys and values: 384 bytes a token (float32)")
    assert len({len(line) for line in (report.heading(), report.lines(record).splitlines()[1])}) == 1


@pytest.mark.parametrize("new", [1, 4])
def test_a_picture_of_any_workload(
    runner: TorchRunner, model: LlamaForCausalLM, tokenizer: Tokenizer, tmp_path: Path, new: int
) -> None:
    pytest.importorskip("matplotlib")
    record = measure(runner, tokenizer, job(2, 9, new, 2), WorkCost.of(model), PEAK, repeats=1)
    assert (record.next_token is None) == (record.answers is None) == (new == 1)
    record.against["transformers"] = Comparison(1.0, 2.0, (2.0,), 1.0)
    setting = report.Setting(
        "a model", 1, "float32", "cpu", "a machine", 1, PEAK, runner.kv_memory, 640, {"transformers": "5"}
    )
    report.draw(tmp_path / "found.png", setting, [record])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ConfigError, match="cannot be written"):
        report.draw(tmp_path, setting, [record])


# Workloads


@pytest.mark.parametrize("context", [2, 3, 20, 640, 100_000])
def test_jobs_fit_every_context(tokenizer: Tokenizer, context: int) -> None:
    stops = set(tokenizer.stop_token_ids)
    assert stops
    jobs = make_jobs(BenchOptions(), Prompts.of(tokenizer, 2048, context, 3))
    assert [j.workload for j in jobs if j.workload != "prefill"] == ["decode", "decode", *ENGINE_WORKLOADS[2:]]
    for made in jobs:
        assert len(made.prompts) == len(made.new_tokens)
        for prompt, new in zip(made.prompts, made.new_tokens, strict=True):
            assert min(len(prompt), new) >= 1
            assert len(prompt) + new <= context
            assert not stops & set(prompt)
            assert all(0 <= token < 2048 for token in prompt)
    assert jobs == make_jobs(BenchOptions(), Prompts.of(tokenizer, 2048, context, 3))
    if context > 5000:
        sizes = {made.case: {len(prompt) for prompt in made.prompts} for made in jobs}
        assert sizes["8 x (128 in, 64 out)"] == {128}
        assert (sizes["512 in"], sizes["2048 in"], sizes["4032 in, 64 out"]) == ({512}, {2048}, {4032})
        mixed = next(made for made in jobs if made.workload == "mixed")
        assert len({len(prompt) for prompt in mixed.prompts}) > 10
        assert len(set(mixed.new_tokens)) > 10
        shared = next(made for made in jobs if made.workload == "shared_prefix")
        assert len({tuple(prompt[:512]) for prompt in shared.prompts}) == 1
        assert len({tuple(prompt[512:]) for prompt in shared.prompts}) == 32


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workloads": ["decode"], "src_length": 4000}, ["--src_length 4000 to 576"]),
        ({"workloads": ["decode"], "max_new_tokens": 700}, ["--max_new_tokens 700 to 639"]),
        ({"workloads": ["prefill"], "prompt_lengths": [10, 640]}, ["--prompt_lengths 640 to 639"]),
        ({"workloads": ["shared_prefix"], "shared_length": 620}, ["--shared_length 620 to 616"]),
        ({"workloads": ["long_context"], "context_length": 5000}, ["--context_length 5000 to 640"]),
        ({"workloads": ["long_context"], "context_length": 100, "max_new_tokens": 100}, ["--max_new_tokens 100 to 99"]),
        ({"workloads": ["long_context"], "src_length": 4000}, []),
        ({"src_length": 576, "prompt_lengths": [639], "shared_length": 616, "context_length": 640}, []),
    ],
)
def test_lengths_that_are_cut_are_told(tokenizer: Tokenizer, given: dict[str, Any], told: list[str]) -> None:
    options = BenchOptions(**given)
    assert cuts(options, 640) == told
    cases = [made.case for made in make_jobs(options, Prompts.of(tokenizer, 2048, 640, 3))]
    sizes = [[int(size) for size in re.findall(r"\d+", case)] for case in cases]
    for room in (int(words.rpartition(" ")[2]) for words in told):
        assert any(room in found or room == sum(found) for found in sizes)


def test_nothing_is_preempted_in_the_room_of_a_job(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    given = job(9, 17, 30, 5)
    small = TorchRunner(model, max_tokens=given.running_tokens())
    assert run_job(small, tokenizer, given).preemptions == 0
    assert run_job(TorchRunner(model, max_tokens=100), tokenizer, given).preemptions > 0


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--workloads", "decod"),
            "WORKLOADS takes one of decode, prefill, mixed, shared_prefix, long_context, serve, not 'decod'",
        ),
        (("--workloads", ""), "--workloads is empty"),
        (("--batch_sizes", "0"), "--batch_sizes is 0: it must be at least 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--against", "vllm"), "--against takes one of transformers, not 'vllm'"),
        (("--plot", "nowhere/a.png"), "there is no folder nowhere"),
        (("--output_file", "."), "is a folder; name a file"),
        (("--against", "transformers", "--lora_path", "x"), "without an adapter"),
        (("--model_name_or_path", "no-such-model"), "no-such-model"),
    ],
)
def test_a_slip_is_one_line(in_process: Call, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    given = arguments if "--model_name_or_path" in arguments else ("--model_name_or_path", str(folder), *arguments)
    found = in_process("bench", *given)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert message in found.stderr
    assert found.stdout == ""


def test_a_missing_program_is_named(in_process: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    found = in_process("bench", "--model_name_or_path", str(folder), "--against", "transformers")
    assert (found.returncode, found.stdout) == (2, "")
    assert "--against transformers: it is not installed here; pip install transformers" in found.stderr


def test_a_program_that_fails_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(GenerationError, match="transformers failed: ValueError: Unrecognized model"),
        peer("transformers", tmp_path, torch.float32, torch.device("cpu"), 1),
    ):
        pass


def test_a_model_without_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        Prompts.of(tokenizer, 2048, 1, 0)


def test_waiting_for_a_gpu_counts(runner: TorchRunner, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is behind: what it has yet to do belongs to the model. The sampler gives numbers, and waits for them."""
    monkeypatch.setattr(measured, "synchronize", lambda _: time.sleep(0.05))
    run = run_job(runner, tokenizer, job(1, 5, 3, 1))
    assert all(step.model_seconds >= 0.05 > step.sampling_seconds for step in run.steps)
