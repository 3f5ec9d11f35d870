"""The engine on one GPU: its answers beside transformers', and the benchmark of one GPU.

The bodies run on the CPU too, so that they are known to be right before they meet a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_generate

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner, Work, cache_block_size
from arriero.engine.sampling_params import SamplingParams
from arriero.formats.download import resolve_model
from arriero.models import attention_libraries
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import TINY_RANDOM_LLAMA

transformers = pytest.importorskip("transformers")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
NEW = 24
SHARED = list(range(20, 80))
PROMPTS = [[1, 2, 3], [7], [*SHARED, 81], [5, 5, 5, 9, 200], [*SHARED, 3], [9, 8, 9, 8, 9, 8, 9], SHARED]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "multi-head": {"num_key_value_heads": 4},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))


@devices
@pytest.mark.parametrize("budget", [2048, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers(family: str, budget: int, device: str, tokenizer: Tokenizer) -> None:
    """In fp32: prompts in chunks, shared beginnings, lost blocks. transformers is on the CPU: a truth without this GPU."""
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "model_type": "llama",
    } | FAMILIES[family]
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), attn_implementation="eager"
    ).eval()
    ours = LlamaForCausalLM(LlamaConfig.from_dict(theirs.config.to_dict())).eval()
    ours.init_weights(0)
    theirs.load_state_dict(ours.state_dict())
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=NEW
        )
        wanted.append(made[0, len(prompt) :].tolist())
    ours.to(device)
    # None is what a user gets, on a CPU each sequence by itself
    for tokens, graphs, kernel in ((4096, True, "gather"), (160, True, None), (4096, False, None)):
        runner = TorchRunner(ours, max_tokens=tokens, paged_attention=kernel, cuda_graphs=graphs)  # type: ignore[arg-type]
        engine = Engine(runner, tokenizer, max_running=6, max_step_tokens=budget)
        assert engine.runner.device.type == device
        answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        assert [answer.token_ids for answer in answers] == wanted
        assert (engine.scheduler.preemptions > 0) == (tokens == 160)
        assert (runner.graphs > 0) == (graphs and device == "cuda")


def small_model(device: str, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """With heads that every kernel takes."""
    settings = {"model_type": "llama", **gpu_generate.TINY, "head_dim": 64, "max_position_embeddings": 2048}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings | {"initializer_range": 0.1} | changes)).eval()
    model.init_weights(0)
    return model.to(device, dtype)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("kernel", "device"),
    [("gather", "cpu")]
    + [
        pytest.param(k, "cuda", marks=pytest.mark.gpu)
        for k in ("gather", "triton", "varlen", "flash_attn", "flashinfer")
    ],
)
def test_every_kernel_attends_alike(kernel: Any, window: int | None, device: str) -> None:
    """Beside ordinary steps, in bf16: rows of very different lengths that grow, with graphs and without; also when the weights
    change between them."""
    if kernel == "varlen" and not attention_libraries.has_paged_varlen():
        pytest.skip("this torch has no varlen_attn with a block table")
    if kernel in ("flash_attn", "flashinfer"):
        pytest.importorskip(kernel)
    changes = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    model = small_model(device, torch.bfloat16, **changes)
    lengths = (700, 3, 255, 256, 511)
    tokens = [torch.randint(0, 256, (n + 12,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    size = cache_block_size(model, paged_attention=kernel)
    per_row = -(-712 // size)
    blocks = [[row + len(lengths) * i for i in range(per_row)] for row in range(len(lengths))]
    made: dict[str, TorchRunner] = {
        name: TorchRunner(
            model, max_tokens=len(lengths) * per_row * size, paged_attention=kernel, cuda_graphs=name == "graphs"
        )
        for name in ("graphs", "eager")
    }
    ordinary = TorchRunner(model, block_size=size, max_tokens=len(lengths) * per_row * size)
    ordinary._steps = None
    for runner in made.values():
        assert runner.paged_attention == kernel  # else a warning says why
    for seed in (0, 1):
        model.init_weights(seed)
        for runner in (ordinary, *made.values()):
            runner.run([Work(t[:n], 0, b, 0) for t, n, b in zip(tokens, lengths, blocks, strict=True)])
        for n in range(12):
            work = [
                Work([t[length + n]], length + n, b, 1) for t, length, b in zip(tokens, lengths, blocks, strict=True)
            ]
            for rows in (slice(0, 5), slice(1, 4), slice(2, 3)):
                expected = ordinary.run(work[rows]).float()
                for runner in made.values():
                    found = runner.run(work[rows]).float()
                    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()  # a few roundings of bf16
    if device == "cuda":
        assert 3 <= made["graphs"].graphs <= 6
        assert made["eager"].graphs == 0


@devices
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("window", [None, 300])
def test_prompts_in_chunks(window: int | None, kv_dtype: str, device: str) -> None:
    """Several in a step, in bf16, beside whole rows in fp32 on a CPU."""
    changes = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    model = small_model(device, torch.bfloat16, **changes)
    exact = small_model("cpu", torch.float32, **changes)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    lengths, chunk = (700, 3, 255, 511), 250
    tokens = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    per_row = 44
    blocks = [[row + len(lengths) * i for i in range(per_row)] for row in range(len(lengths))]
    runner = TorchRunner(model, max_tokens=len(lengths) * per_row * 16, kv_cache_dtype=kv_dtype)
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for start in range(0, max(lengths), chunk):
        rows = [row for row, length in enumerate(lengths) if start < length]
        ends = [min(start + chunk, lengths[row]) for row in rows]
        parts = zip(rows, ends, strict=True)
        logits = runner.run([Work(tokens[row][start:end], start, blocks[row], end - start) for row, end in parts])
        for row, part in zip(rows, torch.split(logits, [end - start for end in ends]), strict=True):
            found[row].append(part)
    for ids, parts in zip(tokens, found, strict=True):
        with torch.no_grad():
            expected = exact(torch.tensor([ids]))[0]
        got = torch.cat(parts).float().cpu()
        assert (got - expected).abs().max() <= 0.05 * expected.abs().max()  # roundings of bf16, and of 8 bits
        assert (got - expected).abs().mean() <= 0.02 * expected.abs().mean()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_compiled_layers_in_graphs() -> None:
    """In fp32, beside ordinary steps."""
    model = small_model("cuda", torch.float32)
    ordinary = TorchRunner(model, max_tokens=1024)
    ordinary._steps = None
    compiled = TorchRunner(model, max_tokens=1024, compile=True)
    done = [0, 0, 0]  # tokens of each sequence, so that nothing is read that was not computed
    for n in range(8):
        work = [Work([n + row], done[row], [2 * row], 1) for row in range(1 + n % 3)]
        for row in range(len(work)):
            done[row] += 1
        expected = ordinary.run(work)
        assert (compiled.run(work) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert compiled.graphs == 3


@devices
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_benchmark_runs(dtype: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs" / "found.jsonl"
    assert gpu_generate.main(["--tiny", "--device", device, "--dtype", dtype, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(gpu_generate.CASES) == 2 + len(found)
    assert len({line.count("|") for line in table}) == 1
    sizes = [(record["requests"], record["prompt_tokens"], record["output_tokens"]) for record in found]
    assert sizes[:2] == [(1, 16, 32), (16, 16 * 4, 16 * 256)]
    count, prompt, output_tokens = sizes[2]
    assert count == 32
    assert 12 * 32 <= min(prompt, output_tokens) <= max(prompt, output_tokens) <= 128 * 32
    for record in found:
        assert record["dtype"] == f"torch.{dtype}"
        assert record["preemptions"] == 0
        assert record["answers"]["gigabytes"] > 0
