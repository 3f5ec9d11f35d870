"""How numbers of keys and values are held, what that costs in precision and in memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from arriero.config.kv_cache import KV_CACHE_DTYPES
from arriero.engine.kv_memory import CACHE_MEMORY_SHARE, KVMemory, default_bytes
from arriero.engine.runner import TorchRunner
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.kv_format import KVFormat
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_cache import PagedCache

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=640,
)
CPU = torch.device("cpu")


def numbers() -> Tensor:
    """(tokens, heads, D) of very different sizes, one token much larger than the others, one of zeros."""
    x = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-12, 12, 50)[:, None, None]
    x[7] = 0.0
    return x


def held(x: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    found = KVFormat.of(name, dtype)
    return found.decode(*found.encode(x), dtype)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    x = numbers()
    step = x.abs().amax(-1, keepdim=True).double() / 127
    error = (held(x, "int8") - x).abs().double()
    assert bool((error <= step * 0.500001).all())
    assert float((error / step.clamp_min(1e-30)).max()) > 0.49, "and no better: it has 255 values"


def test_fp8_is_off_by_a_seventeenth_at_most() -> None:
    """Three bits of mantissa: 1/16 where the number is at least 17/16, down to the smallest normal one, 2^-6, of 448."""
    x = numbers()
    largest = x.abs().amax(-1, keepdim=True).double()
    error = (held(x, "fp8_e4m3") - x).abs().double()
    assert bool((error <= torch.maximum(x.abs().double() / 17, largest / 448 * 2.0**-10) * 1.000001).all())
    assert float((error / x.abs().double().clamp_min(1e-30)).max()) > 1 / 17.1


def test_every_fp8_number_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    wanted = codes.view(torch.float8_e4m3fn).float()
    found = KVFormat.of("fp8_e4m3", torch.float32).decode(codes[None], torch.ones(1), torch.float32)[0]
    finite = wanted.isfinite()
    assert int(finite.sum()) == 254
    assert torch.equal(found[finite], wanted[finite])


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_the_largest_number_of_a_head_is_kept(name: str) -> None:
    x = numbers()
    place = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(held(x, name).gather(-1, place), x.gather(-1, place), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_a_token_is_held_alike_in_any_company(name: str) -> None:
    x = numbers()
    alone = torch.cat([held(x[i : i + 1], name) for i in range(len(x))])
    assert torch.equal(held(x, name), alone)


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_does_not_get_lost(name: str, bad: float) -> None:
    x = torch.ones(3, 2, 8)
    x[1, 0, 5] = bad
    found = held(x, name).isfinite().all(-1)
    assert not bool(found[1, 0])
    assert int(found.sum()) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_model_s_own(dtype: torch.dtype) -> None:
    x = numbers().to(dtype)
    assert torch.equal(held(x, "auto", dtype), x)


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_a_bfloat16_model_reads_the_nearest_bfloat16(name: str) -> None:
    x = numbers().bfloat16()
    assert torch.equal(held(x, name, torch.bfloat16), held(x.float(), name).bfloat16())


# Memory


@pytest.mark.parametrize(
    ("name", "bytes_of_token"),  # 3 layers, 2 heads, keys and values: 12 times 8 numbers, and a scale of 4 bytes
    [("auto", 12 * 32), ("float16", 12 * 16), ("bfloat16", 12 * 16), ("fp8_e4m3", 12 * 12), ("int8", 12 * 12)],
)
def test_a_block_takes_what_it_is_said_to_take(name: str, bytes_of_token: int) -> None:
    assert PagedCache.bytes_of_block(CONFIG, 16, torch.float32, name) == 16 * bytes_of_token
    cache = PagedCache(CONFIG, 5, 16, torch.float32, kv_dtype=name)
    stores = [cache.layers[0], *([cache.scales[0]] if cache.scales is not None else [])]
    assert sum(store.untyped_storage().nbytes() for store in stores) == 5 * 16 * bytes_of_token


@pytest.mark.parametrize(("name", "tokens"), [("auto", 1000), ("bfloat16", 2000), ("int8", 2666), ("fp8_e4m3", 2666)])
def test_more_tokens_fit_into_the_free_memory(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = math.ceil(1000 * 12 * 32 / CACHE_MEMORY_SHARE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    runner = TorchRunner(LlamaForCausalLM(CONFIG).eval(), block_size=1, kv_cache_dtype=name)
    assert (runner.kv_memory.tokens, runner.num_blocks) == (tokens, tokens)
    few = TorchRunner(LlamaForCausalLM(CONFIG).eval(), block_size=16, useful_tokens=100, kv_cache_dtype=name)
    assert few.num_blocks == 7
    told = TorchRunner(LlamaForCausalLM(CONFIG).eval(), block_size=1, kv_cache_dtype=name, memory_share=0.8)
    assert told.num_blocks == pytest.approx(2 * tokens, abs=2)


def test_a_gpu_keeps_room_for_its_steps() -> None:
    gib = 2**30
    assert default_bytes(10 * gib, "cpu") == 4 * gib
    assert default_bytes(60 * gib, "cuda") == 53 * gib
    assert default_bytes(gib, "cuda") == int(0.4 * gib)  # a small one


def test_the_memory_in_words() -> None:
    assert KVMemory(2_000_000_000, 12_240, "int8", 5_000_000_000).text(8192) == (
        "keys and values: 12,240 bytes a token (int8); 163,398 tokens fit into 2.0 GB (40% of the free memory), which is "
        "19.9 requests of 8,192 tokens, the whole context"
    )
    assert KVMemory.measure(CONFIG, torch.bfloat16, "auto", CPU).format == "bfloat16"
    assert KVMemory.measure(CONFIG, torch.bfloat16, "fp8_e4m3", CPU).format == "fp8_e4m3"


# Bad input


def test_an_unknown_format_is_refused() -> None:
    message = "--kv_cache_dtype is 'int4': choose one of auto, float16, bfloat16, fp8_e4m3, int8"
    with pytest.raises(ConfigError, match=message):
        TorchRunner(LlamaForCausalLM(CONFIG), max_tokens=16, kv_cache_dtype="int4")
