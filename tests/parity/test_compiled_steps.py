"""Steps of a few single tokens that torch.compile made for a CPU: what transformers computes, and when they are used."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import arriero
from arriero import cli
from arriero.adapters.lora import apply_lora
from arriero.adapters.lora_config import LoRAConfig
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.serving import ServeOptions
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.errors import ConfigError
from arriero.models.compiled_rows import CompiledRows
from arriero.models.compiler import check_compiler
from arriero.models.llama import LlamaForCausalLM
from arriero.serving.engines import runner_over

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
from block_sequences import BLOCK, PROMPTS, SEQUENCES, blocks_of, decoded
from byte_tokenizer import write_byte_tokenizer
from twin_models import VOCAB, twin_models

try:
    check_compiler("this file", "")
except ConfigError:
    pytest.skip("no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.timeout(300)  # compilations, of which torch keeps what it made

FAMILIES: dict[str, dict[str, Any]] = {
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "tied, one key-value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "no groups, no size a multiple of anything": {
        "num_key_value_heads": 4, "hidden_size": 36, "intermediate_size": 50, "head_dim": 10, "vocab_size": 67,
    },
    "qwen2, window in some layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}  # fmt: skip
TINY = "__internal_testing__/tiny-random-llama"


def runner(model: LlamaForCausalLM, compile: bool = True, **settings: Any) -> TorchRunner:
    return TorchRunner(model, block_size=BLOCK, max_tokens=BLOCK * 96, compile=compile, **settings)


class Counted:
    """How many steps were computed by compiled functions, of how many rows each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        logits = CompiledRows.logits

        def counted(own: CompiledRows, tokens: Tensor, *others: Any) -> Tensor:
            self.rows.append(len(tokens))
            return logits(own, tokens, *others)

        monkeypatch.setattr(CompiledRows, "logits", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    torch._dynamo.utils.counters.clear()
    failures: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", failures.append)
    log = logging.getLogger("arriero.engine.compiled_steps")
    log.addHandler(handler)
    yield Counted(monkeypatch)
    log.removeHandler(handler)
    assert not failures  # a function that does not compile is a warning, and the step goes the ordinary way


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, counted: Counted) -> None:
    """Rows of very different lengths, over the borders of blocks, blocks scattered, rows filled up from three to four."""
    ours, theirs = twin_models(max_position_embeddings=128, num_hidden_layers=3, **FAMILIES[family])
    compiled = runner(ours)
    for store in compiled._cache.layers:
        store.fill_(float("nan"))  # what nobody wrote must not count
    for sequences in ((0, 1, 3), (2, 4, 5)):
        for i, logits in zip(sequences, decoded(compiled, sequences), strict=True):
            with torch.no_grad():
                expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counted.rows == [4] * 18
    kinds = {ours.config.layer_sliding_window(layer) for layer in range(3)}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + len(
        kinds
    )  # the head, and not one for each layer


def test_greedy_answers_are_those_of_transformers(tmp_path: Path, counted: Counted) -> None:
    """Rows come and go, prompts in chunks and beginnings shared; blocks are lost. 16 bits hold this model's weights."""
    ours, theirs = twin_models(max_position_embeddings=128)
    with torch.no_grad():
        for parameter in [*ours.parameters(), *theirs.parameters()]:
            parameter.copy_(parameter.bfloat16())
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path))
    compiled = TorchRunner(ours, block_size=BLOCK, max_tokens=100, compile=True)
    assert compiled._compiled is not None
    assert compiled._compiled._rows._dtype == torch.bfloat16
    engine = Engine(compiled, tokenizer, max_running=5, max_step_tokens=7)
    answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, ignore_eos=True))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            max_new_tokens=20,
        )
        assert answer.token_ids == made[0, len(prompt) :].tolist()
    assert engine.scheduler.preemptions > 0
    assert {1, 2, 4, 8} >= set(counted.rows)
    assert len(counted.rows) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_is_nearer_to_its_fp32_self(dtype: torch.dtype, counted: Counted) -> None:
    """Of prompts and of keys and values the rounding stays; weights are read as they are."""
    ours, theirs = twin_models(max_position_embeddings=128, attention_bias=True, num_hidden_layers=3)
    ours.to(dtype)
    theirs.load_state_dict({name: value.to(dtype).float() for name, value in theirs.state_dict().items()})
    compiled, ordinary = (decoded(runner(ours, one), (0, 2, 5)) for one in (True, False))
    for i, logits, others in zip((0, 2, 5), compiled, ordinary, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
        assert logits.dtype == torch.float32
        error = (logits - expected).abs().mean() / expected.abs().max()
        assert error <= torch.finfo(dtype).eps / 2
        assert error < 0.8 * (others - expected).abs().mean() / expected.abs().max()
    assert counted.rows == [4] * 9


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3", "float16"])
def test_other_formats_of_keys_and_values(kv_cache_dtype: str, counted: Counted) -> None:
    """What is held of a token is the same by either way, and so are the logits but for numbers that were just rounded apart."""
    ours, _ = twin_models(max_position_embeddings=128)
    found = [decoded(runner(ours, one, kv_cache_dtype=kv_cache_dtype), (0,)) for one in (True, False)]
    for logits, expected in zip(*found, strict=True):
        assert (logits - expected).abs().max() <= 1e-2 * expected.abs().max()
        assert (logits - expected).abs().mean() <= 1e-4 * expected.abs().max()
    assert counted.rows == [1] * 9


def test_rope_that_depends_on_the_length_and_weights_that_change(counted: Counted) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ours, _ = twin_models(max_position_embeddings=32, rope_parameters=rope)
    compiled, ordinary = runner(ours), runner(ours, compile=False)
    for _ in range(2):
        for logits, expected in zip(decoded(compiled, (0, 1)), decoded(ordinary, (0, 1)), strict=True):
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.mul_(1.1)
    assert counted.rows == [2] * 18


def test_what_was_compiled_is_found_again(counted: Counted) -> None:
    """On the disk, whatever the cache's size: that is another in each process, by the free memory."""
    ours, _ = twin_models(max_position_embeddings=128, hidden_size=40)
    decoded(runner(ours), (1,))
    counters = torch._dynamo.utils.counters
    counters.clear()
    decoded(TorchRunner(ours, block_size=BLOCK, max_tokens=BLOCK * 97, compile=True), (1,))
    assert counters["stats"]["unique_graphs"] == 2  # a layer, the head
    found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    assert found >= 2
    assert not counters["aot_autograd"]["autograd_cache_miss"]
    assert not counters["inductor"]["fxgraph_cache_miss"]


@pytest.mark.parametrize(
    ("starts", "rows"),
    [
        ([5] * 8, [8]),
        ([5, 5, 5], [4]),
        ([600] * 5, [8]),
        ([2000, 1, 1, 1], []),
        ([9, 2000, *range(7), 1990], [8, 2]),
        ([5] * 33, []),
    ],
    ids=["eight", "filled up", "long", "too uneven", "groups of like lengths", "too many"],
)
def test_which_steps_are_compiled(starts: list[int], rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def logits(_: CompiledRows, tokens: Tensor, positions: Tensor, slots: Tensor, new: Tensor, __: Any) -> Tensor:
        assert torch.equal(slots.gather(1, positions[:, None])[:, 0], new)
        assert torch.equal(new, tokens * 2048 + positions)
        assert slots.shape[1] < positions.max() + 17
        seen.append(len(tokens))
        return tokens[:, None].expand(-1, VOCAB).float()

    monkeypatch.setattr(CompiledRows, "logits", logits)
    ours, _ = twin_models(max_position_embeddings=2048)
    given = TorchRunner(ours, max_tokens=len(starts) * 2048, compile=True)
    for store in given._cache.layers:
        store.zero_()
    work = [Work([i], start, range(i * 128, (i + 1) * 128), 1) for i, start in enumerate(starts)]
    found = given.run(work)
    assert found.shape == (len(starts), VOCAB)
    if rows:
        assert found[:, 0].tolist() == list(range(len(starts)))
    assert given.run([Work([3, 4], 0, range(128), 1)]).shape == (1, VOCAB)  # a prompt
    assert seen == rows


def test_a_model_that_it_cannot_be_done_for(caplog: pytest.LogCaptureFixture) -> None:
    """It is computed as without, and a line says so."""
    adapted, _ = twin_models()
    apply_lora(adapted, LoRAConfig(rank=3, alpha=6.0, target_modules=("q_proj",)))
    with caplog.at_level(logging.WARNING):
        given = runner(adapted)
    assert given._compiled is None
    assert ["adapters" in message for message in caplog.messages] == [True]
    assert given.run([Work([3], 0, blocks_of(0), 1)]).isfinite().all()


def test_what_cannot_be_compiled(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler it is refused; with one that fails the steps are computed as without, and one line says so."""
    ours, _ = twin_models(max_position_embeddings=128)
    expected = decoded(runner(ours, compile=False), (0, 1))
    given = runner(ours)
    monkeypatch.setattr("arriero.models.compiled_rows.run_layer", _broken)
    with caplog.at_level(logging.WARNING):
        found = decoded(given, (0, 1))
    assert [message.startswith("decoding goes on without torch.compile") for message in caplog.messages] == [True]
    for logits, wanted in zip(found, expected, strict=True):
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _no_compiler)
    with pytest.raises(ConfigError, match="--torch_compile needs a C\\+\\+ compiler"):
        runner(ours)


@pytest.mark.parametrize("verb", ["predict", "chat", "evaluate", "bench", "load"])
def test_the_option_is_heard(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def logits(own: CompiledRows, tokens: Tensor, *_: Any) -> Tensor:
        seen.append(len(tokens))
        return torch.zeros(len(tokens), own._model.config.vocab_size)

    monkeypatch.setattr(CompiledRows, "logits", logits)
    (tmp_path / "dev.json").write_text('{"src": "ab", "tgt": "cd"}\n')
    if verb == "load":
        arriero.load(TINY, device="cpu", torch_compile=True).generate("ab", max_new_tokens=4)
    else:
        own = {
            "predict": ["--data_file", str(tmp_path / "dev.json")],
            "chat": ["--prompt", "ab"],
            "evaluate": ["--dataset_path", str(tmp_path), "--eval_with_do_generation"],
            "bench": ["decode", "--batch_sizes", "1", "--src_length", "8", "--repeats", "1"],
        }
        common = ["--model_name_or_path", TINY, "--device", "cpu", "--torch_compile", "--max_new_tokens", "4"]
        assert cli.main([verb, *own[verb], *common]) == 0
    assert set(seen) == {1}


def _broken(*_: Any) -> Tensor:
    raise RuntimeError("g++: fatal error\nmore lines")


def _no_compiler() -> str:
    raise RuntimeError("No working C++ compiler found")


def test_prepared_before_the_first_step(counted: Counted) -> None:
    """Every number of rows, so that no request waits for a compiler; what it wrote is nobody's."""
    ours, theirs = twin_models(max_position_embeddings=128, num_hidden_layers=1)
    runner(ours, compile=False).prepare()
    assert not counted.rows
    prepared = runner(ours)
    prepared.prepare()
    assert counted.rows == [1, 2, 4, 8]
    (logits,) = decoded(prepared, (0,))
    with torch.no_grad():
        expected = theirs(torch.tensor([SEQUENCES[0]])).logits[0, -9:]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_prepared_without_a_compiler_that_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, once; the weights in another order are let go."""

    def fails(own: CompiledRows, *given: Any) -> Tensor:
        raise RuntimeError("g++ is broken")

    monkeypatch.setattr(CompiledRows, "logits", fails)
    ours, _ = twin_models()
    given = runner(ours)
    with caplog.at_level(logging.WARNING):
        given.prepare()
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without torch.compile: g++ is broken"
    ]
    assert given._compiled is not None
    assert given._compiled._rows is None
    assert len(decoded(given, (1,))) == 1


def test_serve_compiles_before_it_takes_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(own: CompiledRows, tokens: Tensor, *others: Any) -> Tensor:
        sizes.append(len(tokens))
        return torch.zeros(len(tokens), VOCAB)

    monkeypatch.setattr(CompiledRows, "logits", noted)
    ours, _ = twin_models()
    loaded: Any = SimpleNamespace(model=ours)
    for wanted in (False, True):
        runner_over(loaded, None, KVCacheOptions(), CompilationOptions(torch_compile=wanted), ServeOptions())
        assert sizes == ([1, 2, 4, 8] if wanted else [])


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise PermissionError("no such place")

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", fails)
    with pytest.raises(ConfigError, match="set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"):
        runner(twin_models()[0])
