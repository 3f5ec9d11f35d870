"""Keys and values in fewer bits: answers are those of transformers with the same rounding, whatever happens beside them.

The truth is a cache of transformers that rounds what comes into it, by formulas and conversions of its own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.adapters.prefix import PrefixConfig, apply_prefix, prefix_kv, prefix_state
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.draft_model import DraftModel
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.request_adapters import AdapterPool
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import FAMILIES, NEW, PROMPTS, VOCABULARY, pair, tokenizer  # noqa: F401

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FORMATS = ["float16", "bfloat16", "fp8_e4m3", "int8"]
# `make test` has each family in int8, which has a scale for each row, and each format with one family
FEW = [name if name == "int8" else pytest.param(name, marks=pytest.mark.peers) for name in FORMATS]
GRID = [
    (family, name) if name == "int8" or family == "llama" else pytest.param(family, name, marks=pytest.mark.peers)
    for family in FAMILIES
    for name in FORMATS
]
# tokens of a step, running at once, room, block size, guesses
CIRCUMSTANCES = {
    "together": (2048, 8, 4096, 16, None),
    "chunks and guesses": (7, 3, 4096, 1, "lookup"),
    "chunks, lost blocks, guesses of a model": (24, 8, 120, 16, "draft"),
    "lost blocks": (24, 8, 120, 1, None),
    "alone": (2048, 1, 256, 4, None),
}


def rounded(x: Tensor, name: str) -> Tensor:
    """(..., D), each row with a scale of its own where the format has one."""
    if name in ("float16", "bfloat16"):
        return x.to(getattr(torch, name)).to(x.dtype)
    limit = 127.0 if name == "int8" else 448.0
    scale = x.abs().max(dim=-1, keepdim=True).values / limit
    scaled = torch.where(scale > 0, x / scale, x)
    if name == "int8":
        return torch.round(scaled) * scale
    return scaled.to(torch.float8_e4m3fn).to(x.dtype) * scale


def rounding_cache(config: Any, name: str) -> Any:
    class Cache(transformers.DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(rounded(key_states, name), rounded(value_states, name), layer_idx, *args, **kwargs)

    return Cache(config=config)


@torch.no_grad()
def expected(theirs: Any, prompt: list[int], cache: Any) -> list[int]:
    """Greedy tokens after what the cache holds already and a prompt."""
    tokens: list[int] = []
    for _ in range(NEW):
        given = torch.tensor([prompt if not tokens else tokens[-1:]])
        tokens.append(int(theirs(given, past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
    return tokens


def engine_of(model: Any, tokenizer: Tokenizer, name: str, way: str) -> Engine:  # noqa: F811
    budget, running, tokens, block_size, guess = CIRCUMSTANCES[way]
    speculation = None
    if guess == "lookup":
        speculation = Speculation(PromptLookup(longest=2, shortest=1), tokens=3, window=10**9)
    elif guess == "draft":
        draft = TorchRunner(model, max_tokens=1024, kv_cache_dtype=name)
        speculation = Speculation(DraftModel(draft, VOCABULARY), window=10**9)
    runner = TorchRunner(model, block_size=block_size, max_tokens=tokens, kv_cache_dtype=name)
    return Engine(runner, tokenizer, max_running=running, max_step_tokens=budget, speculation=speculation)


@pytest.mark.parametrize(("family", "name"), GRID)
def test_answers_are_those_of_a_rounding_cache(family: str, name: str, tokenizer: Tokenizer) -> None:  # noqa: F811
    ours, theirs = pair(**FAMILIES[family])
    wanted = [expected(theirs, prompt, rounding_cache(theirs.config, name)) for prompt in PROMPTS]
    for way in CIRCUMSTANCES:
        engine = engine_of(ours, tokenizer, name, way)
        answers = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
        assert [answer.token_ids for answer in answers] == wanted, way
        engine.blocks.check([])
        assert engine.scheduler.preemptions > 0 or "lost" not in way
        if way == "alone":
            assert answers[-1].cached_tokens > 0, "what is shared is rounded already"
        if engine.speculation is not None and way == "chunks and guesses":
            assert engine.speculation.counters.proposed > 0


def test_rounding_is_seen_in_the_logits(tokenizer: Tokenizer) -> None:  # noqa: F811
    """Log-probabilities in each format are the rounding cache's, and not those of another format."""
    ours, theirs = pair()
    prompt = PROMPTS[2]
    found = {}
    for name in FORMATS:
        cache = rounding_cache(theirs.config, name)
        with torch.no_grad():
            wanted = theirs(torch.tensor([prompt]), past_key_values=cache).logits[0].log_softmax(-1)
        engine = engine_of(ours, tokenizer, name, "chunks and guesses")
        [answer] = engine.generate([prompt], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
        found[name] = torch.tensor([one.logprob for one in answer.prompt_logprobs if one is not None])
        own = wanted[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(found[name], own, rtol=1e-4, atol=1e-4)
    assert all(not torch.allclose(found[a], found[b], atol=1e-3) for a in FORMATS for b in FORMATS if a < b)


@pytest.mark.parametrize("name", FEW)
def test_a_prefix_is_rounded_too(name: str, tokenizer: Tokenizer) -> None:  # noqa: F811
    ours, theirs = pair()
    apply_prefix(ours, PrefixConfig(5))
    for parameter in prefix_state(ours).values():
        parameter.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(3))
    plain = prefix_kv(ours)
    assert plain is not None
    wanted = []
    for prompt in PROMPTS:
        cache = rounding_cache(theirs.config, name)
        for layer, keys in plain.keys.items():
            cache.update(keys[None], plain.values[layer][None], layer)
        wanted.append(expected(theirs, prompt, cache))
    for way in CIRCUMSTANCES:
        if CIRCUMSTANCES[way][-1] != "draft":
            answers = engine_of(ours, tokenizer, name, way).generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
            assert [answer.token_ids for answer in answers] == wanted, way


@pytest.mark.parametrize("name", FEW)
def test_adapters_of_a_batch_are_rounded_as_alone(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    ours, _ = pair()
    pool, wanted = AdapterPool(ours), {None: pair()[1]}
    for seed, targets in enumerate((["k_proj", "v_proj"], ["q_proj", "up_proj"])):
        wrapped = peft.get_peft_model(pair()[1], peft.LoraConfig(r=4, target_modules=targets)).eval()
        with torch.no_grad():
            for number, parameter in enumerate(p for p in wrapped.parameters() if p.requires_grad):
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(100 * seed + number))
        wrapped.save_pretrained(str(tmp_path / targets[0]))
        pool.load(targets[0], tmp_path / targets[0])
        wanted[targets[0]] = wrapped
    cases = [(adapter, prompt) for prompt in PROMPTS for adapter in wanted]
    answers = [expected(wanted[adapter], prompt, rounding_cache(pair()[1].config, name)) for adapter, prompt in cases]
    for tokens, budget in ((4096, 2048), (200, 16)):
        runner = TorchRunner(ours, block_size=4, max_tokens=tokens, adapters=pool, kv_cache_dtype=name)
        engine = Engine(runner, tokenizer, max_step_tokens=budget)
        found = engine.generate(
            [prompt for _, prompt in cases],
            SamplingParams(max_new_tokens=NEW),
            adapters=[adapter for adapter, _ in cases],
        )
        assert [answer.token_ids for answer in found] == answers
        assert (engine.scheduler.preemptions > 0) == (tokens == 200)


def test_perplexity_of_the_real_model(smollm2: Path) -> None:
    """Within 1 % in 8 bits; `docs` has the measurement over 2,000 tokens."""
    from arriero.formats.hf import load_model

    tokenizer = load_tokenizer(smollm2)  # noqa: F811
    model = load_model(smollm2, dtype=torch.float32)
    text = Path(__file__).with_name("test_engine.py").read_text(encoding="utf-8")
    prompt = tokenizer.encode(text)[:200]
    perplexity = {}
    for name in ("auto", "float16", "bfloat16", "int8", "fp8_e4m3"):
        runner = TorchRunner(model, max_tokens=224, kv_cache_dtype=name)
        [answer] = Engine(runner, tokenizer).generate([prompt], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
        found = [one.logprob for one in answer.prompt_logprobs if one is not None]
        perplexity[name] = math.exp(-sum(found) / len(found))
    change = {name: abs(value / perplexity["auto"] - 1) for name, value in perplexity.items()}
    assert 0 < change["float16"] < 0.001
    assert 0 < change["bfloat16"] < 0.005
    assert 0 < change["int8"] < 0.01
    assert 0 < change["fp8_e4m3"] < 0.03
