"""The decoder against transformers, eager attention, fp32: every family, every rope type, random shapes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_cache import PagedCache, Run

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCAB = 97
CONTEXT = 24  # max_position_embeddings: small, so that sequences go beyond it
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 12,
        "attention_factor": 1.3,
    },
}


def random_shape(seed: int) -> dict[str, Any]:
    """A small configuration as a config.json would hold it; heads and widths of every odd kind."""
    rng = random.Random(seed)
    heads, key_value_heads = rng.choice([(9, 3), (4, 2), (4, 1), (3, 3), (6, 2), (5, 1), (2, 2)])
    head_dim = rng.choice([6, 8, 10, 16, 20])
    width = rng.choice([4, 8, 12])  # hidden_size / heads: not head_dim, most of the time
    return {
        "vocab_size": VOCAB,
        "hidden_size": heads * width,
        "intermediate_size": rng.choice([24, 37, 64]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "initializer_range": 0.2,  # large enough for logits that differ
    }


def family_values(family: str, seed: int, *, window: int | None = None) -> dict[str, Any]:
    rng = random.Random(seed + 1000)
    values = random_shape(seed) | {"model_type": family}
    if family == "llama":
        values |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    if family == "qwen3":
        values |= {"attention_bias": rng.random() < 0.5}
    if family == "mistral":
        values |= {"sliding_window": window}
    if family in ("qwen2", "qwen3") and window is not None:
        values |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return values


def oracle(values: dict[str, Any], seed: int, implementation: str = "eager") -> Any:
    """transformers' model of a config.json with every parameter random, norms and biases too."""
    values = copy.deepcopy(values)  # transformers fills in the rope dictionary that it is given
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * spread if "norm" in name else 0.15 * spread)
    return model


def ours(model: Any, values: dict[str, Any]) -> LlamaForCausalLM:
    """Our model of the same configuration with the oracle's weights, by their names."""
    twin = LlamaForCausalLM(LlamaConfig.from_dict(values)).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def tokens(batch: int, size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, size), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(values: dict[str, Any], seed: int, size: int, implementation: str = "eager") -> None:
    model = oracle(values, seed, implementation)
    twin = ours(model, values)
    input_ids = tokens(2, size, seed)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        got = twin(input_ids)
    assert expected.std() > 0.1  # a comparison of something
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_rope(family: str, rope: str, seed: int) -> None:
    seed = seed * 100 + FAMILIES.index(family) * 10 + list(ROPES).index(rope)
    values = family_values(family, seed)
    # The base must suit what the scaling was made for: with yarn on a tiny context, a tiny base.
    values |= {"rope_theta": 10000.0, "rope_scaling": ROPES[rope]}
    assert_same_logits(values, seed, CONTEXT - 3)
    assert_same_logits(values, seed, CONTEXT + 13)


@pytest.mark.parametrize("style", ["type", "rope_parameters"])
@pytest.mark.parametrize("rope", ["linear", "dynamic", "llama3", "yarn"])
def test_old_and_new_spelling_of_rope(rope: str, style: str) -> None:
    values = family_values("llama", 5)
    scaling = dict(ROPES[rope] or {})
    if style == "type":
        scaling["type"] = scaling.pop("rope_type")
        values |= {"rope_theta": 500.0, "rope_scaling": scaling}
    else:
        values |= {"rope_parameters": {**scaling, "rope_theta": 500.0}}
    assert_same_logits(values, 5, CONTEXT + 9)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_sliding_window(family: str, window: int, implementation: str) -> None:
    seed = 3 + window
    values = family_values(family, seed, window=window) | {"num_hidden_layers": 3}
    assert_same_logits(values, seed, 20, implementation)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layer_types_choose_the_windowed_layers(family: str) -> None:
    values = family_values(family, 11, window=4) | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    assert_same_logits(values, 11, 18)


@pytest.mark.parametrize("seed", range(12))
def test_smollm_shape_and_random_shapes(seed: int) -> None:
    values = family_values("llama", 500 + seed)
    if seed == 0:  # SmolLM2's proportions: 9 heads, 3 key-value heads, tied
        values |= {"hidden_size": 72, "head_dim": 8, "num_attention_heads": 9, "num_key_value_heads": 3}
        values |= {"tie_word_embeddings": True, "rope_theta": 100000.0, "attention_bias": False, "mlp_bias": False}
    assert_same_logits(values, seed, 17, "sdpa")


def test_head_dim_and_heads_by_default() -> None:
    values = family_values("llama", 8)
    del values["head_dim"], values["num_key_value_heads"]
    assert_same_logits(values, 8, 15)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side: str, window: int | None) -> None:
    values = family_values("mistral", 21, window=window)
    model = oracle(values, 21)
    twin = ours(model, values)
    input_ids = tokens(3, 14, 21)
    mask = torch.ones(3, 14, dtype=torch.long)
    for row, padding in enumerate((0, 4, 9)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(14 - padding, 14)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        got = twin(input_ids, positions, AttentionInfo.padded(mask))
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=TOLERANCE, rtol=0)
    assert torch.isfinite(got).all()


CASES = [("llama", "default", None), ("qwen2", "llama3", None), ("mistral", "yarn", 5), ("qwen3", "dynamic", 3)]


@pytest.mark.parametrize(("family", "rope", "window"), CASES)
def test_packed_documents_equal_each_alone_in_transformers(family: str, rope: str, window: int | None) -> None:
    values = family_values(family, 31, window=window) | {"rope_theta": 1000.0, "rope_scaling": ROPES[rope]}
    twin = ours(oracle(values, 31), values)
    lengths = [5, 1, CONTEXT + 6, 2, 11]
    input_ids = tokens(1, sum(lengths), 31)
    with torch.no_grad():
        got = twin(input_ids, attention=AttentionInfo.documents(lengths))
    for document, logits in zip(input_ids.split(lengths, dim=1), got.split(lengths, dim=1), strict=True):
        fresh = oracle(values, 31)  # transformers' dynamic RoPE remembers the longest sequence it has seen
        with torch.no_grad():
            expected = fresh(document, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("family", "rope", "window"), CASES)
def test_gradients_of_packed_equal_separate_ones_in_transformers(family: str, rope: str, window: int | None) -> None:
    values = family_values(family, 41, window=window) | {"rope_theta": 1000.0, "rope_scaling": ROPES[rope]}
    model = oracle(values, 41)
    twin = ours(model, values)
    lengths = [6, 1, 13]
    input_ids = tokens(1, sum(lengths), 41)
    weight = torch.randn(1, sum(lengths), VOCAB, generator=torch.Generator().manual_seed(1))
    (twin(input_ids, attention=AttentionInfo.documents(lengths)) * weight).sum().backward()
    for document, part in zip(input_ids.split(lengths, dim=1), weight.split(lengths, dim=1), strict=True):
        (model(document, use_cache=False).logits * part).sum().backward()
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        mine = gradients[name].grad
        assert mine is not None, name
        scale = parameter.grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(mine / scale, parameter.grad / scale, atol=TOLERANCE, rtol=0, msg=name)


@pytest.mark.parametrize(("family", "rope", "window"), [case for case in CASES if case[1] != "dynamic"])
def test_cached_decode_equals_full_forward(family: str, rope: str, window: int | None) -> None:
    values = family_values(family, 51, window=window) | {"rope_theta": 1000.0, "rope_scaling": ROPES[rope]}
    model = oracle(values, 51)
    twin = ours(model, values)
    prompts, total = [3, 9, 1], 15
    input_ids = tokens(3, total, 51)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        cache = PagedCache(twin.config, num_blocks=12, block_size=4)
        blocks = [[row, row + 3, row + 6, row + 9] for row in range(3)]  # none are neighbours
        lengths = list(prompts)
        packed = torch.cat([input_ids[row, :length] for row, length in enumerate(prompts)])[None]
        view = cache.view([Run(0, length, blocks[row]) for row, length in enumerate(prompts)])
        logits = twin(packed, view.positions, view.attention, view)
        for row, part in enumerate(logits[0].split(prompts)):
            torch.testing.assert_close(part, expected[row, : prompts[row]], atol=TOLERANCE, rtol=0)
        while rows := [row for row in range(3) if lengths[row] < total]:
            new = torch.stack([input_ids[row, lengths[row]] for row in rows])[None]
            view = cache.view([Run(lengths[row], 1, blocks[row]) for row in rows])
            logits = twin(new, view.positions, view.attention, view)
            for slot, row in enumerate(rows):
                torch.testing.assert_close(logits[0, slot], expected[row, lengths[row]], atol=TOLERANCE, rtol=0)
                lengths[row] += 1


def test_cached_decode_with_dynamic_rope_equals_transformers_cache() -> None:
    """Beyond the context a cache holds keys rotated with earlier frequencies: as transformers has it, step by step."""
    values = family_values("llama", 61) | {"rope_scaling": ROPES["dynamic"]}
    model = oracle(values, 61)
    twin = ours(model, values)
    total, prompt = CONTEXT + 8, CONTEXT - 2
    input_ids = tokens(1, total, 61)
    cache = PagedCache(twin.config, num_blocks=total, block_size=1)
    with torch.no_grad():
        past = model(input_ids[:, :prompt], use_cache=True).past_key_values
        view = cache.view([Run(0, prompt, range(total))])
        twin(input_ids[:, :prompt], view.positions, view.attention, view)
        for at in range(prompt, total):
            expected = model(input_ids[:, at : at + 1], past_key_values=past, use_cache=True).logits
            view = cache.view([Run(at, 1, range(total))])
            got = twin(input_ids[:, at : at + 1], view.positions, view.attention, view)
            torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_transformers_is(dtype: torch.dtype) -> None:
    values = family_values("qwen3", 71)
    model = oracle(values, 71)
    exact_twin = ours(model, values)
    input_ids = tokens(1, 16, 71)
    with torch.no_grad():
        exact = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(exact_twin(input_ids), exact, atol=TOLERANCE, rtol=0)
        theirs = (model.to(dtype)(input_ids, use_cache=False).logits.float() - exact).abs().mean()
        mine = (exact_twin.to(dtype)(input_ids).float() - exact).abs().mean()
    assert mine <= 1.3 * theirs
