"""The tables of cos and sin against transformers' at real sizes, where every part of the spectrum counts."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from arriero.models.config import LlamaConfig
from arriero.models.rope import RotaryEmbedding

transformers = pytest.importorskip("transformers")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")


def scaling_of(rope_type: str, rng: random.Random) -> dict[str, Any] | None:
    original = rng.choice([64, 512, 2048, 8192])
    scaling: dict[str, Any] = {"rope_type": rope_type, "factor": rng.choice([1.5, 2.0, 8.0, 32.0])}
    if rope_type == "default":
        return None
    if rope_type == "llama3":
        low = rng.choice([0.5, 1.0, 2.0])
        scaling |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([2.0, 4.0])}
    if rope_type == "yarn":
        optional = {
            "beta_fast": rng.choice([16.0, 32.0, 64.0]),
            "beta_slow": rng.choice([0.5, 1.0, 2.0]),
            "mscale": rng.choice([0.5, 1.0]),
            "mscale_all_dim": rng.choice([0.7, 1.0]),
            "truncate": rng.random() < 0.5,
            "attention_factor": rng.choice([None, 0.9, 1.2]),
        }
        scaling |= {key: value for key, value in optional.items() if rng.random() < 0.5}
    if rope_type in ("llama3", "yarn") and rng.random() < 0.7:
        scaling["original_max_position_embeddings"] = original
    return scaling


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_tables(rope_type: str, seed: int) -> None:
    rng = random.Random(f"{rope_type} {seed}")
    values = {
        "vocab_size": 8,
        "hidden_size": 256,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": rng.choice([32, 64, 80, 128]),
        "max_position_embeddings": rng.choice([256, 1024, 4096]),
        "rope_theta": rng.choice([1e4, 1e5, 5e5, 1e6]),
        "rope_scaling": scaling_of(rope_type, rng),
    }
    theirs = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(values)))
    mine = RotaryEmbedding(LlamaConfig.from_dict(values | {"model_type": "llama"}))
    torch.testing.assert_close(mine.inverse_frequencies, theirs.inv_freq, atol=0, rtol=1e-6)
    assert mine.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-6)

    limit = values["max_position_embeddings"]
    for size in (limit // 2, limit + limit // 3):
        positions = torch.arange(size)[None]
        expected_cos, expected_sin = theirs(torch.zeros(1), positions)
        cos, signed_sin = (table[:, :, 0] for table in mine(positions, torch.float32))
        half = values["head_dim"] // 2
        sin = torch.cat((-signed_sin[..., :half], signed_sin[..., half:]), dim=-1)
        # An angle of thousands of radians in fp32 is known to about 1e-4 only, by either side.
        torch.testing.assert_close(cos, expected_cos, atol=1e-3, rtol=0)
        torch.testing.assert_close(sin, expected_sin, atol=1e-3, rtol=0)
        assert (cos - expected_cos).abs().mean() < 2e-5


@pytest.mark.parametrize(
    ("original", "theta", "fast", "slow"),
    [(4, 1e4, 32.0, 1.0), (6, 1e4, 1.0, 1.0), (2048, 1e4, 8.0, 8.0), (10**6, 10.0, 32.0, 1.0)],
)
def test_yarn_where_the_ramp_vanishes(original: int, theta: float, fast: float, slow: float) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "beta_fast": fast, "beta_slow": slow}
    scaling |= {"original_max_position_embeddings": original, "truncate": False}
    values = {"vocab_size": 8, "hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "rope_theta": theta, "rope_scaling": scaling}
    theirs = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(values)))
    mine = RotaryEmbedding(LlamaConfig.from_dict(values | {"model_type": "llama"}))
    torch.testing.assert_close(mine.inverse_frequencies, theirs.inv_freq, atol=0, rtol=1e-6)
