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
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.formats.download import resolve_model
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
    for tokens in (4096, 160):
        engine = Engine(TorchRunner(ours, max_tokens=tokens), tokenizer, max_running=6, max_step_tokens=budget)
        assert engine.runner.device.type == device
        answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        assert [answer.token_ids for answer in answers] == wanted
        assert (engine.scheduler.preemptions > 0) == (tokens == 160)


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
