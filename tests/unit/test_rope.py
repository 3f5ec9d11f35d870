"""Rotary embedding: its own laws, and its frequencies against closed forms. Parity with transformers: tests/parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arriero.models.config import LlamaConfig
from arriero.models.rope import RotaryEmbedding, rope_frequencies, rotate


def config(scaling: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "rope_scaling": scaling,
    }
    return LlamaConfig(**values | changes)


def test_rotation_is_that_of_complex_numbers() -> None:
    rotary = RotaryEmbedding(config())
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 0, 100, 2]])
    got = rotate(x, *rotary(positions, torch.float32))
    frequencies = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turns = torch.exp(1j * positions[..., None].double() * frequencies)[:, :, None]
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * turns
    torch.testing.assert_close(got.double(), torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=0)


def test_scores_depend_on_distance_only() -> None:
    rotary = RotaryEmbedding(config())
    query, key = torch.randn(8), torch.randn(8)

    def score(at: int, other: int) -> float:
        tables = rotary(torch.tensor([[at, other]]), torch.float32)
        a, b = rotate(torch.stack((query, key))[None, :, None], *tables)[0, :, 0]
        return float(a @ b)

    assert score(3, 1) == pytest.approx(score(13, 11), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_linear_divides_positions() -> None:
    plain, scaled = RotaryEmbedding(config()), RotaryEmbedding(config({"rope_type": "linear", "factor": 4.0}))
    positions = torch.arange(0, 40, 4)[None]
    for mine, expected in zip(scaled(positions, torch.float32), plain(positions // 4, torch.float32), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    settings = config(scaling, head_dim=128, rope_theta=500000.0)
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    frequencies, factor = rope_frequencies(settings)
    assert factor == 1.0
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    torch.testing.assert_close(frequencies[short], plain[short])
    torch.testing.assert_close(frequencies[long], plain[long] / 8)
    between = ~(short | long)
    assert between.any()
    assert ((frequencies < plain) & (frequencies > plain / 8))[between].all()


def test_yarn_temperature_and_ends_of_the_spectrum() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    frequencies, factor = rope_frequencies(config(scaling, head_dim=128))
    plain = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert factor == pytest.approx(0.1 * math.log(4.0) + 1)
    torch.testing.assert_close(frequencies[:10], plain[:10])
    torch.testing.assert_close(frequencies[-10:], plain[-10:] / 4)


def test_dynamic_scales_each_row_by_its_own_length() -> None:
    rotary = RotaryEmbedding(config({"rope_type": "dynamic", "factor": 2.0}))
    short, long = torch.arange(10)[None], torch.arange(10)[None] + 30
    together = rotary(torch.cat((short, long)), torch.float32)
    for table, alone in zip(together, rotary(short, torch.float32), strict=True):
        assert torch.equal(table[:1], alone)
    for table, alone in zip(together, rotary(long, torch.float32), strict=True):
        assert torch.equal(table[1:], alone)
    # Within the limit it is plain RoPE; after a long sequence too (nothing is remembered).
    for table, plain in zip(rotary(short, torch.float32), RotaryEmbedding(config())(short, torch.float32), strict=True):
        assert torch.equal(table, plain)


def test_the_table_survives_every_move() -> None:
    settings = config({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8})
    expected, _ = rope_frequencies(settings)
    assert RotaryEmbedding(settings).state_dict() == {}
    with torch.device("meta"):
        on_meta = RotaryEmbedding(settings)
    for rotary in (
        on_meta,
        RotaryEmbedding(settings).to(torch.bfloat16),
        RotaryEmbedding(settings).half().float(),
        RotaryEmbedding(settings).to("meta").to_empty(device="cpu"),
    ):
        assert torch.equal(rotary.inverse_frequencies, expected)
    assert RotaryEmbedding(settings).to("meta").inverse_frequencies.is_meta
    rotary.inverse_frequencies.zero_()
    rotary.reset()
    assert torch.equal(rotary.inverse_frequencies, expected)
