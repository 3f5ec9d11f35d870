"""Steps of one token a sequence by block tables, padded and recorded as a GPU would: nothing else than the ordinary steps."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine import decode_graphs
from arriero.engine import runner as runner_module
from arriero.engine.decode_graphs import DecodeSteps, rung
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner, Work
from arriero.engine.sampling_params import SamplingParams
from arriero.models.llama import LlamaForCausalLM

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
from block_sequences import BLOCK, PROMPTS, SEQUENCES, blocks_of, decoded
from byte_tokenizer import write_byte_tokenizer
from recorded_steps import RecordedOperations
from twin_models import VOCAB, twin_models

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "tied, one key-value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "mistral, window": {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "qwen2, window in some layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def table_runner(model: LlamaForCausalLM, capture: Callable[..., Any] | None = None, **settings: Any) -> TorchRunner:
    """Whose steps of one token a sequence go by block tables; recorded, if they are to be."""
    made = TorchRunner(model, weight_copies=False, paged_attention="gather", **settings)
    assert made.paged_attention == "gather"
    if capture is not None:
        steps = made._steps
        made._steps = DecodeSteps(steps._model, steps._cache, steps._kernel, steps._max_blocks, capture)
    return made


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, recorded: bool) -> None:
    """Rows of very different lengths, over the borders of blocks and of widths, blocks scattered."""
    ours, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    capture = RecordedOperations() if recorded else None
    tables = table_runner(ours, capture, block_size=BLOCK, max_tokens=BLOCK * 96)
    tables._cache.layers[0][:, : BLOCK * 96] = float("nan")  # what nobody wrote must not count
    tables._cache.layers[1][:, : BLOCK * 96] = float("nan")
    every = tuple(range(len(SEQUENCES)))
    for sequences in (every, (0, 2, 5), (4,)):
        for i, logits in zip(sequences, decoded(tables, sequences), strict=True):
            with torch.no_grad():
                expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    if capture is not None:
        assert capture.captures == 3  # 8 rows, 4 and 1
        assert capture.replays == 27


@pytest.mark.parametrize("few", [1, 4, 9])
def test_single_tokens_beside_prompts(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are whole, in part and scored in a step with single tokens, in any order."""
    monkeypatch.setattr(runner_module, "FEW_SINGLES", few)
    ours, theirs = twin_models(max_position_embeddings=128)
    capture = RecordedOperations()
    tables = table_runner(ours, capture, block_size=BLOCK, max_tokens=BLOCK * 96)
    tables.run([Work(SEQUENCES[i][:10], 0, blocks_of(i), 0) for i in (0, 1, 2, 3)])
    spans = {4: (0, 5, 2), 2: (10, 11, 1), 0: (10, 11, 1), 5: (0, 17, 17), 1: (10, 11, 1), 3: (10, 30, 0)}
    given = tables.run([Work(SEQUENCES[i][a:b], a, blocks_of(i), wanted) for i, (a, b, wanted) in spans.items()])
    expected = []
    for i, (_, end, wanted) in spans.items():
        with torch.no_grad():
            expected.append(theirs(torch.tensor([SEQUENCES[i][:end]])).logits[0, end - wanted :])
    assert (given - torch.cat(expected)).abs().max() <= 1e-5 * torch.cat(expected).abs().max()
    assert capture.replays == (few <= 3)


@pytest.mark.parametrize("table_tokens", [BLOCK, 256])
def test_tables_grow_with_the_longest_row(table_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "READ_WHOLE", (table_tokens, 2))
    ours, theirs = twin_models(max_position_embeddings=128)
    capture = RecordedOperations()
    tables = table_runner(ours, capture, block_size=BLOCK, max_tokens=BLOCK * 96)
    sequence = SEQUENCES[0] + SEQUENCES[3]
    logits = [tables.run([Work([token], n, blocks_of(0) + blocks_of(1), 1)])[0] for n, token in enumerate(sequence)]
    with torch.no_grad():
        expected = theirs(torch.tensor([sequence])).logits[0]
    assert (torch.stack(logits) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert capture.captures == (6 if table_tokens == BLOCK else 1)  # 89 tokens: 1, 2, 4, 8, 16 and 32 blocks of 4


def test_rope_that_depends_on_the_length() -> None:
    """The cache holds what earlier lengths made of the keys; ordinary steps are the truth, transformers' engine test theirs."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ours, _ = twin_models(max_position_embeddings=32, rope_parameters=rope)
    ordinary = TorchRunner(ours, weight_copies=False, block_size=BLOCK, max_tokens=BLOCK * 96)
    tables = table_runner(ours, RecordedOperations(), block_size=BLOCK, max_tokens=BLOCK * 96)
    for logits, expected in zip(decoded(tables, (0, 1, 3)), decoded(ordinary, (0, 1, 3)), strict=True):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_padding_changes_nothing() -> None:
    """No block of a sequence, and no result: with five rows three are added."""
    ours, _ = twin_models(max_position_embeddings=128)
    rows = (0, 1, 2, 3, 4)
    plain = table_runner(ours, block_size=BLOCK, max_tokens=BLOCK * 96)
    padded = table_runner(ours, RecordedOperations(), block_size=BLOCK, max_tokens=BLOCK * 96)
    for given in (plain, padded):
        for store in given._cache.layers:
            store[:, : BLOCK * 96] = 7.0
    for logits, expected in zip(decoded(padded, rows), decoded(plain, rows), strict=True):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    others = [block for i in (5,) for block in blocks_of(i)]
    for store, expected in zip(padded._cache.layers, plain._cache.layers, strict=True):
        blocks = store.view(len(store), -1, BLOCK, store.shape[-1])
        assert blocks[:, others].eq(7.0).all()
        assert (blocks[:, :96] - expected.view_as(blocks)[:, :96]).abs().max() < 1e-5
        assert blocks[:, -1].eq(0.0).all()


def test_a_row_of_nan_is_alone_with_it() -> None:
    """Also those that later use the blocks of a sequence that had such numbers."""
    ours, theirs = twin_models(max_position_embeddings=128)
    tables = table_runner(ours, RecordedOperations(), block_size=BLOCK, max_tokens=BLOCK * 96)
    for store in tables._cache.layers:
        store.view(len(store), -1, BLOCK, store.shape[-1])[:, blocks_of(1)] = float("nan")
    tables.run([Work(SEQUENCES[0][:20], 0, blocks_of(0), 0)])
    work = [
        Work([3], 20, blocks_of(1), 1),
        Work([SEQUENCES[0][20]], 20, blocks_of(0), 1),
        Work([9], 0, blocks_of(1)[8:], 1),
    ]
    broken, whole, later = tables.run(work)
    assert broken.isnan().all()
    for logits, tokens in ((whole, SEQUENCES[0][:21]), (later, [9])):
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens])).logits[0, -1]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


NEW = 20


@functools.cache
def answered(family: str) -> tuple[LlamaForCausalLM, list[list[int]]]:
    """Our model, and the answers of transformers to all prompts."""
    ours, theirs = twin_models(max_position_embeddings=128, **FAMILIES[family])
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            max_new_tokens=NEW,
        )
        wanted.append(made[0, len(prompt) :].tolist())
    return ours, wanted


@pytest.mark.parametrize(
    ("tokens", "block_size", "budget"),
    [
        *((4096, 1, 2048), (100, 16, 7)),
        *(pytest.param(*other, marks=pytest.mark.peers) for other in ((4096, 16, 7), (100, 1, 2048))),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(
    family: str, tokens: int, block_size: int, budget: int, tokenizer: Tokenizer
) -> None:
    """Rows come and go, prompts in chunks and beginnings shared; with 100 tokens of cache, blocks are lost."""
    ours, wanted = answered(family)
    capture = RecordedOperations()
    engine = Engine(
        table_runner(ours, capture, block_size=block_size, max_tokens=tokens),
        tokenizer,
        max_running=5,
        max_step_tokens=budget,
    )
    answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [answer.token_ids for answer in answers] == wanted
    assert (engine.scheduler.preemptions > 0) == (tokens == 100)
    assert 1 <= capture.captures <= 4  # 1, 2, 4 and 8 rows
    assert capture.replays >= 10


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3", "bfloat16"])
def test_other_formats_of_keys_and_values(kv_cache_dtype: str) -> None:
    """What is held of a token is the same by either way: so are the logits."""
    ours, _ = twin_models(max_position_embeddings=128)
    settings: dict[str, Any] = {"block_size": BLOCK, "max_tokens": BLOCK * 96, "kv_cache_dtype": kv_cache_dtype}
    ordinary = TorchRunner(ours, weight_copies=False, **settings)
    tables = table_runner(ours, RecordedOperations(), **settings)
    for logits, expected in zip(decoded(tables, (0, 1, 3)), decoded(ordinary, (0, 1, 3)), strict=True):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_weights_that_change_are_recorded_anew() -> None:
    """In place, or as other tensors: what a graph reads is no more."""
    ours, _ = twin_models(max_position_embeddings=128, attention_bias=True)
    other, theirs = twin_models(seed=1, max_position_embeddings=128, attention_bias=True)
    capture = RecordedOperations()
    tables = table_runner(ours, capture, block_size=BLOCK, max_tokens=BLOCK * 96)
    decoded(tables, (1, 2))
    with torch.no_grad():
        for n, (own, new) in enumerate(zip(ours.parameters(), other.parameters(), strict=True)):
            if n % 2:
                own.copy_(new)
            else:
                own.data = new.detach().clone()
    for i, logits in zip((1, 2), decoded(tables, (1, 2)), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert capture.captures == 2


def test_where_nothing_can_be_captured_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def broken(compute: Callable[[], Tensor], *, first: bool) -> Any:
        calls.append(compute())
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    ours, theirs = twin_models(max_position_embeddings=128)
    tables = table_runner(ours, broken, block_size=BLOCK, max_tokens=BLOCK * 96)
    with caplog.at_level(logging.WARNING):
        answers = decoded(tables, (0, 1, 2))
    for i, logits in enumerate(answers):
        with torch.no_grad():
            expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(calls) == 1
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "decoding goes on without CUDA graphs: CUDA error: operation not permitted when stream is capturing"


def test_what_has_adapters_more_tokens_or_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are ordinary steps, and the last is not captured."""
    ours, _ = twin_models(max_position_embeddings=128)
    capture = RecordedOperations()
    tables = table_runner(ours, capture, block_size=BLOCK, max_tokens=BLOCK * 96)
    one, two = Work([3], 0, blocks_of(0), 1), Work([4], 0, blocks_of(1), 1)
    tables.run([one, Work([3, 4], 0, blocks_of(1), 1)])
    assert tables.run([one, Work([4], 0, blocks_of(1), 0)]).shape == (1, VOCAB)
    with monkeypatch.context() as patch:
        added = []

        class Deltas:
            def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
                added.append((layer, name))

        patch.setattr(tables, "_deltas", lambda work: Deltas())
        tables.run([one, two])
        assert len(added) == 14
    monkeypatch.setattr(decode_graphs, "MAX_GRAPH_ROWS", 1)
    tables.run([one, two])
    assert capture.captures == 0
    tables.run([one])
    assert capture.captures == 1


def test_the_ladder() -> None:
    assert [rung(rows) for rows in range(1, 18)] == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 24]
    assert len({rung(rows) for rows in range(1, 513)}) == 23
    assert all(rung(rows) < 1.25 * rows for rows in range(33, 513))
    assert all(rung(rung(rows)) == rung(rows) >= rows for rows in range(1, 513))


def test_a_cpu_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "CudaCapture", None)  # cannot be called
    ours, _ = twin_models()
    assert TorchRunner(ours, max_tokens=64).paged_attention is None
    assert TorchRunner(ours, max_tokens=64).num_blocks == TorchRunner(ours, max_tokens=64)._cache.num_blocks == 4
    tables = TorchRunner(ours, max_tokens=64, paged_attention="gather")
    assert (tables.num_blocks, tables._cache.num_blocks) == (4, 6)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "families", [("llama",), pytest.param(("llama", "qwen3"), marks=pytest.mark.peers)], ids=", ".join
)
def test_compiled_layers(families: tuple[str, ...]) -> None:
    """By inductor: as on a GPU: of any number of rows, of layers that are alike and of one that is not."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for family in families:
        ours, theirs = twin_models(max_position_embeddings=128, num_hidden_layers=4, **FAMILIES[family])
        every = tuple(range(len(SEQUENCES)))
        compiled = TorchRunner(
            ours, block_size=BLOCK, max_tokens=BLOCK * 96, compile=True, paged_attention="gather", weight_copies=True
        )
        for sequences in (every, (0, 2), (4,)):
            for i, logits in zip(sequences, decoded(compiled, sequences), strict=True):
                with torch.no_grad():
                    expected = theirs(torch.tensor([SEQUENCES[i]])).logits[0, -9:]
                assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not counters["graph_break"]
    assert (
        2 * len(families) <= counters["stats"]["unique_graphs"] <= 6 * len(families)
    )  # not one for each layer and number of rows
