"""Which kernel attends, what it is given, and that one that computes something else is not used.

The libraries' functions are stood for by ones that do what their documentation says, written out. That shows that they are
called as documented, and not that the libraries work: see tests/gpu/test_gpu_engine.py.
"""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from arriero.engine.runner import TorchRunner, Work, cache_block_size
from arriero.errors import ConfigError
from arriero.models import attention_libraries, paged_attention
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_attention import KernelName, block_size_of, choose_kernel

HEADS, KEY_VALUE_HEADS, SIZE = 4, 2, 16
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}


def written_out(query: Tensor, keys: Tensor, values: Tensor, scale: float, left: int) -> Tensor:
    """One query, (H, D), at the end of keys and values (S, KV, D); it sees `left` before its own, or all for -1."""
    if left >= 0:
        keys, values = keys[-left - 1 :], values[-left - 1 :]
    output = torch.empty_like(query)
    for head in range(len(query)):
        group = head * keys.shape[1] // len(query)
        scores = torch.tensor([float(query[head] @ key[group]) * scale for key in keys])
        weights = (scores - scores.max()).exp()
        output[head] = (weights / weights.sum()) @ values[:, group]
    return output


def row_of(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """(S, KV, D) from pages (blocks, page size, KV, D)."""
    return torch.cat([pages[int(block)] for block in blocks])[:length]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    assert q.shape[1:] == (1, HEADS, SIZE)
    assert k_cache.shape[1] % 256 == 0
    assert k_cache.stride(-1) == v_cache.stride(-1) == block_table.stride(-1) == 1
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert causal
    assert window_size in ((-1, -1), (4, 0))
    rows = []
    for query, blocks, length in zip(q[:, 0], block_table, cache_seqlens.tolist(), strict=True):
        keys, values = (row_of(cache, blocks, length) for cache in (k_cache, v_cache))
        rows.append(written_out(query, keys, values, softmax_scale, window_size[0]))
    return torch.stack(rows)[:, None]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    rows = len(query)
    assert cu_seq_k is not None
    assert cu_seq_q.tolist() == list(range(rows + 1))
    assert cu_seq_k.diff().equal(seqused_k)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, enable_gqa) == (1, True)
    assert max_k >= int(seqused_k.max())
    return flash_attn_with_kvcache(
        query[:, None],
        key,
        value,
        cache_seqlens=seqused_k,
        block_table=block_table,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
    )[:, 0]


class BatchDecodeWithPagedKVCacheWrapper:
    """With the buffers of a graph: their contents count, not what `plan` was given."""

    def __init__(self, workspace: Tensor, kv_layout: str, **settings: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"
        assert settings["use_cuda_graph"]
        self.offsets = settings["paged_kv_indptr_buffer"]
        self.pages = settings["paged_kv_indices_buffer"]
        self.last = settings["paged_kv_last_page_len_buffer"]

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert (num_qo_heads, num_kv_heads, head_dim) == (HEADS, KEY_VALUE_HEADS, SIZE)
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert q_data_type == kv_data_type == torch.float32
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        self.offsets.copy_(indptr)
        self.pages[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.size, self.left, self.scale = page_size, window_left, sm_scale

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        rows = []
        for i, query in enumerate(q):
            pages = self.pages[self.offsets[i] : self.offsets[i + 1]]
            length = (len(pages) - 1) * self.size + int(self.last[i])
            keys, values = (row_of(part.transpose(1, 2), pages, length) for part in cache)
            rows.append(written_out(query, keys, values, self.scale, self.left))
        return torch.stack(rows)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    monkeypatch.setitem(
        sys.modules,
        "flashinfer",
        SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper),
    )
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    monkeypatch.setattr(attention_libraries, "has_paged_varlen", lambda: True)
    monkeypatch.setattr(attention_libraries, "FLASHINFER_WORKSPACE", 16)


def model(window: int | None = None) -> LlamaForCausalLM:
    changes = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    made = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG | changes)).eval()
    made.init_weights(0)
    return made


def logits_of(runner: TorchRunner) -> Tensor:
    """Of two sequences that grow over the border of a block."""
    size, generator = runner.block_size, torch.Generator().manual_seed(0)
    starts, blocks = (size - 2, 3), ([5, 1, 2], [4, 0])
    tokens = [torch.randint(0, 61, (start + 4,), generator=generator).tolist() for start in starts]
    runner.run([Work(t[:s], 0, b, 0) for t, s, b in zip(tokens, starts, blocks, strict=True)])
    steps = [
        runner.run([Work([t[s + n]], s + n, b, 1) for t, s, b in zip(tokens, starts, blocks, strict=True)])
        for n in range(4)
    ]
    return torch.cat(steps)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ["flashinfer", "flash_attn", "varlen"])
def test_kernels_are_called_as_documented(name: Any, window: int | None) -> None:
    given = model(window)
    size = cache_block_size(given, paged_attention=name)
    assert size == (16 if name == "flashinfer" else 256)
    tables = TorchRunner(given, max_tokens=6 * size, paged_attention=name, weight_copies=False)
    assert (tables.paged_attention, tables.block_size) == (name, size)
    ordinary = TorchRunner(given, block_size=size, max_tokens=6 * size, weight_copies=False)
    found, expected = logits_of(tables), logits_of(ordinary)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_fails_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attend(q: Tensor, *_: Any, **__: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        return q * math.pi

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_with_kvcache", attend)
    with caplog.at_level(logging.WARNING):
        tables = TorchRunner(model(), max_tokens=2048, paged_attention="flash_attn", weight_copies=False)
    assert tables.paged_attention == "gather"
    [line] = [record.getMessage() for record in caplog.records]
    assert (
        line
        == {
            "raises": "FlashAttention cannot be used for paged attention: no kernel image is available",
            "wrong": "FlashAttention gives other numbers than torch's attention and is not used",
        }[fault]
    )
    ordinary = TorchRunner(model(), block_size=256, max_tokens=2048, weight_copies=False)
    expected = logits_of(ordinary)
    assert (logits_of(tables) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_kernel_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(attention_libraries, "has_paged_varlen", lambda: False)
    with pytest.raises(ConfigError, match="paged attention by flashinfer needs a package that cannot be imported"):
        TorchRunner(model(), max_tokens=64, paged_attention="flashinfer")
    with pytest.raises(ConfigError, match=r"by varlen needs .*varlen_attn of torch .* takes no block table"):
        TorchRunner(model(), max_tokens=512, paged_attention="varlen")
    with pytest.raises(ConfigError, match="by 'vllm' is not to be had here: choose one of triton, flashinfer"):
        TorchRunner(model(), max_tokens=512, paged_attention="vllm")  # type: ignore[arg-type]


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = {"triton"}
    monkeypatch.setattr(paged_attention, "_is_usable", lambda package: package in usable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_kernel(torch.device("cpu")) == "gather"
    assert choose_kernel(torch.device("cuda")) == "triton"
    usable.clear()
    assert choose_kernel(torch.device("cuda")) == "gather"
    usable.add("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose_kernel(torch.device("cuda")) == "gather"
    assert [block_size_of(name, 16) for name in get_args(KernelName)] == [16, 16, 256, 256, 16]
