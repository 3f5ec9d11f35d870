"""Paged attention by libraries for GPUs: FlashInfer, FlashAttention and torch's own.

FlashInfer has run on an H100 (docs/gpu.md); the others are written after their libraries' sources. `make_kernel` asks each for
a small result first.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.models.paged_attention import DecodeKernel, KernelName, Table
from arriero.models.paged_cache import PagedCache

FLASHINFER_WORKSPACE = 128 * 2**20  # bytes, as its documentation recommends


def attention_by(
    name: str, cache: PagedCache, heads: int, scale: float, windows: Sequence[int | None], max_blocks: int
) -> DecodeKernel:
    """The kernel of the library of this name; see `FlashInfer` for the arguments.

    Raises:
        ImportError: it is not installed, or too old.
    """
    if name == "flashinfer":
        return FlashInfer(cache, heads, scale, windows, max_blocks)
    if name == "flash_attn":
        return FlashAttention()
    if not has_paged_varlen():
        raise ImportError(f"varlen_attn of torch {torch.__version__} takes no block table")
    return Varlen()


def _pages(cache: PagedCache, layer: int) -> tuple[Tensor, Tensor]:
    """The keys and the values of a layer, (KV, blocks, block_size, D) each, without a copy."""
    store = cache.layers[layer]
    keys, values = store.view(len(store), cache.num_blocks, cache.block_size, -1).chunk(2)
    return keys, values


def _window(sliding_window: int | None) -> int:
    """How far a query sees to the left, its own key not counted, as the kernels take it."""
    return -1 if sliding_window is None else sliding_window - 1


class FlashAttention:
    """`flash_attn_with_kvcache` of the package flash-attn, version 2. Has never run."""

    name: KernelName = "flash_attn"
    reads_whole_tables = False

    def __init__(self) -> None:
        self._attend: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_with_kvcache

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Nothing has to be known."""

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `DecodeKernel`."""
        keys, values = (pages.permute(1, 2, 0, 3) for pages in _pages(cache, layer))
        left = _window(sliding_window)
        attended = self._attend(
            query[:, None],
            keys,
            values,
            cache_seqlens=table.lengths,
            block_table=table.blocks.int(),
            softmax_scale=scale,
            causal=True,
            window_size=(left, 0 if left >= 0 else -1),
        )
        return attended[:, 0]


class Varlen:
    """`torch.nn.attention.varlen.varlen_attn` with a block table (torch 2.13 has it, 2.11 not). Has never run."""

    name: KernelName = "varlen"
    reads_whole_tables = False

    def __init__(self) -> None:
        self._attend: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Nothing has to be known."""

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `DecodeKernel`."""
        keys, values = (pages.permute(1, 2, 0, 3) for pages in _pages(cache, layer))
        rows, left = len(query), _window(sliding_window)
        return self._attend(
            query,
            keys,
            values,
            torch.arange(rows + 1, dtype=torch.int32, device=query.device),
            F.pad(table.lengths.cumsum(0), (1, 0)).int(),
            1,
            table.blocks.shape[1] * cache.block_size,
            scale=scale,
            window_size=(left, 0 if left >= 0 else -1),
            enable_gqa=keys.shape[2] != query.shape[1],
            seqused_k=table.lengths,
            block_table=table.blocks.int(),
        )


class FlashInfer:
    """`BatchDecodeWithPagedKVCacheWrapper` of FlashInfer, planned before each step, a wrapper for each number of rows."""

    name: KernelName = "flashinfer"
    reads_whole_tables = False

    def __init__(
        self, cache: PagedCache, heads: int, scale: float, windows: Sequence[int | None], max_blocks: int
    ) -> None:
        """
        Args:
            heads: of the queries.
            scale: the layers' factor on the scores.
            windows: all that the layers have.
            max_blocks: of a row.
        """
        self._flashinfer: Any = importlib.import_module("flashinfer")
        self._cache, self._heads, self._scale, self._windows = cache, heads, scale, tuple(dict.fromkeys(windows))
        self._workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=cache.device)
        self._max_blocks = max_blocks
        self._wrappers: dict[tuple[int, int | None], Any] = {}

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Say which pages the rows have: the wrappers hold them in buffers that graphs read."""
        size, ends, pages = self._cache.block_size, [0], list[int]()
        for own, length in zip(blocks, lengths, strict=True):
            pages += own[: -(-length // size)]
            ends.append(len(pages))
        key_value_heads, head_dim = len(self._cache.layers[0]) // 2, self._cache.layers[0].shape[-1]
        offsets, indices = torch.tensor(ends, dtype=torch.int32), torch.tensor(pages, dtype=torch.int32)
        last = torch.tensor([(length - 1) % size + 1 for length in lengths], dtype=torch.int32)
        for window in self._windows:
            self._wrapper(len(lengths), window).plan(
                offsets,
                indices,
                last,
                self._heads,
                key_value_heads,
                head_dim,
                size,
                window_left=_window(window),
                q_data_type=self._cache.format.dtype,
                kv_data_type=self._cache.format.dtype,
                sm_scale=self._scale,
            )

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `DecodeKernel`."""
        keys, values = (pages.transpose(0, 1) for pages in _pages(cache, layer))
        attended: Tensor = self._wrappers[len(query), sliding_window].run(query.contiguous(), (keys, values))
        return attended

    def _wrapper(self, rows: int, window: int | None) -> Any:
        if (rows, window) not in self._wrappers:
            groups = 2 * self._heads // len(self._cache.layers[0])
            sizes = (rows + 1, rows * self._max_blocks, rows)
            buffers = [torch.zeros(size, dtype=torch.int32, device=self._cache.device) for size in sizes]
            self._wrappers[rows, window] = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=groups > 2,
                paged_kv_indptr_buffer=buffers[0],
                paged_kv_indices_buffer=buffers[1],
                paged_kv_last_page_len_buffer=buffers[2],
            )
        return self._wrappers[rows, window]


@once
def has_paged_varlen() -> bool:
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # only CUDA has it; the import takes a second
        with contextlib.suppress(ImportError):
            from torch.nn.attention import varlen

            known = inspect.signature(varlen.varlen_attn).parameters.keys()
            return {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"} <= known
    return False
