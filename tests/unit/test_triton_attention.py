"""Triton's paged attention beside attention written out in fp64.

On a GPU, or where Triton is installed on a CPU with TRITON_INTERPRET=1, where its operations are NumPy's.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.models.config import LlamaConfig
from arriero.models.paged_attention import SPARE_BLOCKS, Table, agrees
from arriero.models.paged_cache import PagedCache

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)
TritonAttention = importlib.import_module("arriero.models.triton_attention").TritonAttention


pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # whose products NumPy knows
BLOCK_SIZE = 16


def written_out(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """(H, D) of keys and values (KV, S, D), all fp64."""
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    groups = len(query) // len(keys)
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    return torch.einsum("hs,hsd->hd", (torch.einsum("hd,hsd->hs", query, keys) * scale).softmax(-1), values)


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "kind", "dtype", "window"),
    [
        (4, 2, 64, "auto", torch.float32, None),
        (8, 1, 32, "auto", torch.float32, 100),
        (3, 3, 80, "auto", torch.float32, None),
        (32, 8, 128, "auto", HALF, None),
        (9, 3, 64, "int8", torch.float32, None),
        (9, 3, 64, "int8", HALF, 33),
        *([(8, 2, 64, "fp8_e4m3", torch.bfloat16, None)] if CUDA else []),  # NumPy has no such numbers
    ],
)
def test_it_is_attention(
    heads: int, key_heads: int, size: int, kind: str, dtype: torch.dtype, window: int | None
) -> None:
    """Over sequences of one token to many blocks, that lie anywhere, beside numbers that are none."""
    settings: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": heads * size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": size,
    }
    random = torch.Generator().manual_seed(heads)
    lengths = [1, 16, 17, 200, 700] if CUDA else [1, 17, 300]
    width = -(-max(lengths) // BLOCK_SIZE) + 3
    blocks = torch.randperm(len(lengths) * width, generator=random).view(len(lengths), width)
    cache = PagedCache(LlamaConfig.from_dict(settings), blocks.numel() + SPARE_BLOCKS, BLOCK_SIZE, dtype, DEVICE, kind)
    cache.layers[0].fill_(torch.nan if cache.layers[0].is_floating_point() else 1)
    if cache.scales is not None:
        cache.scales[0].fill_(torch.nan)
    kept = []
    for row, length in zip(blocks, lengths, strict=True):
        given = torch.randn(2 * key_heads, length, size, generator=random).to(DEVICE, dtype)
        cache.put(row.tolist(), 0, {0: given[:key_heads]}, {0: given[key_heads:]})
        codes, scales = cache.format.encode(given)
        kept.append(cache.format.decode(codes, scales, dtype).double().cpu())
    numbers = torch.cat((torch.zeros(len(lengths), 1, dtype=torch.long), torch.tensor(lengths)[:, None] - 1, blocks), 1)
    query = torch.randn(len(lengths), heads, size, generator=random).to(DEVICE, dtype)
    kernel, scale = TritonAttention(cache), size**-0.5
    for programs in (1, 64):  # of sequences that are not cut, and of many parts
        kernel._programs = programs
        found = kernel.attend(query, cache, 0, Table.of(numbers.to(DEVICE), BLOCK_SIZE), scale, window)
        for one, own, result in zip(query.double().cpu(), kept, found.double().cpu(), strict=True):
            expected = written_out(one, own[:key_heads], own[key_heads:], scale, window)
            tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # of fp32 sums; of bf16 weights and results
            assert (result - expected).abs().max() <= tolerance * own.abs().max()


def test_it_passes_the_check_that_every_engine_makes() -> None:
    settings = {"model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    for kind in ("auto", "int8"):
        cache = PagedCache(LlamaConfig.from_dict(settings), 4, BLOCK_SIZE, torch.float32, DEVICE, kind)
        assert agrees(TritonAttention(cache), cache, 4, 0.25, None, torch.float32)
