"""Paged attention of one new token for each of many sequences as a Triton kernel, which reads keys and values where they lie.

A sequence's keys are cut into parts, so that few sequences keep a whole GPU busy; each part gives its own softmax, and these
are joined by their sums ("Flash-Decoding", https://pytorch.org/blog/flash-decoding/). The query heads of a group read their
keys together. Numbers of 8 bits become the queries' type as they are read.

Imported only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arriero.models.paged_attention import KernelName, Table
from arriero.models.paged_cache import PagedCache

TILE = 64  # keys that are read at a time
LEAST_HEADS = 16  # of a tile of queries: what matrix units take
PROGRAMS_PER_PROCESSOR = 4  # that keep a GPU's memory busy
WARPS, STAGES = 4, 3
_LOG2_E = 1.4426950408889634
_PLAIN, _INT8, _FP8 = 0, 1, 2


class TritonAttention:
    """A `DecodeKernel` for a cache of any format, on one device."""

    name: KernelName = "triton"
    reads_whole_tables = False

    def __init__(self, cache: PagedCache) -> None:
        form = cache.format
        self._form = _PLAIN if not form.scaled else _INT8 if form.dtype == torch.int8 else _FP8
        cuda = cache.device.type == "cuda"
        processors = torch.cuda.get_device_properties(cache.device).multi_processor_count if cuda else 1
        self._programs = PROGRAMS_PER_PROCESSOR * processors

    def plan(self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Nothing has to be known."""

    def attend(
        self, query: Tensor, cache: PagedCache, layer: int, table: Table, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `DecodeKernel`."""
        rows, heads, size = query.shape
        store, scales = cache.layers[layer], cache.scales[layer] if cache.scales is not None else None
        groups = 2 * heads // len(store)
        width = table.blocks.shape[1] * cache.block_size
        parts = max(1, min(-(-width // (2 * TILE)), -(-self._programs // (rows * heads // groups))))
        output = torch.empty((rows, heads, size), dtype=query.dtype, device=query.device)
        shape = (rows, heads, parts)
        pieces = output if parts == 1 else torch.empty((*shape, size), dtype=torch.float32, device=query.device)
        sums = pieces if parts == 1 else torch.empty(shape, dtype=torch.float32, device=query.device)
        dim = triton.next_power_of_2(size)
        if query.stride(-1) != 1:
            query = query.contiguous()
        _attend_part[rows, heads // groups, parts](
            query,
            store,
            store if scales is None else scales,
            table.blocks,
            table.lengths,
            pieces,
            sums,
            query.stride(0),
            query.stride(1),
            store.stride(0),
            store.shape[1],
            table.blocks.stride(0),
            scale * _LOG2_E,
            sliding_window or 0,
            PARTS=parts,
            GROUPS=groups,
            HEAD_DIM=size,
            BLOCK_SIZE=cache.block_size,
            FORM=self._form,
            TILE=TILE,
            HEADS=max(LEAST_HEADS, triton.next_power_of_2(groups)),
            DIM=dim,
            num_warps=WARPS,
            num_stages=STAGES,
        )
        if parts > 1:
            _join_parts[rows * heads,](
                pieces, sums, output, PARTS=parts, HEAD_DIM=size, DIM=dim, ALL=triton.next_power_of_2(parts)
            )
        return output


@triton.jit  # type: ignore[untyped-decorator]
def _attend_part(  # type: ignore[no-untyped-def]
    query,  # (R, H, D)
    store,  # (2 KV, slots, D)
    scales,  # (2 KV, slots) fp32, of numbers of 8 bits
    blocks,  # (R, W) int64
    lengths,  # (R,) int32
    pieces,  # (R, H, PARTS, D) fp32; of one part the output itself, (R, H, D)
    sums,  # (R, H, PARTS) fp32: the base-2 logarithm of the sum of each part's weights
    query_row,
    query_head,
    store_head,
    slots,
    blocks_row,
    scale,  # of the scores, whose weights are powers of 2
    window,  # keys that a query sees, its own among them; 0: all
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row, key_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_heads = tl.num_programs(1)
    length = tl.load(lengths + row)
    start = tl.maximum(length - window, 0) if window > 0 else 0
    own = tl.cdiv(tl.cdiv(length - start, TILE), PARTS) * TILE
    begin = start + part * own
    end = tl.minimum(begin + own, length)

    of_heads, of_dim, of_tile = tl.arange(0, HEADS), tl.arange(0, DIM), tl.arange(0, TILE)
    heads = key_head * GROUPS + of_heads
    real_heads, real_dim = of_heads < GROUPS, of_dim < HEAD_DIM
    q = tl.load(
        query + row * query_row + heads[:, None] * query_head + of_dim[None, :],
        mask=real_heads[:, None] & real_dim[None, :],
        other=0.0,
    )
    keys = store + key_head.to(tl.int64) * store_head
    values = store + (key_heads + key_head).to(tl.int64) * store_head

    greatest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, DIM], tl.float32)
    for at in range(begin, end, TILE):
        places = at + of_tile
        seen = places < end
        block = tl.load(blocks + row * blocks_row + places // BLOCK_SIZE, mask=seen, other=0)
        slot = block * BLOCK_SIZE + places % BLOCK_SIZE
        offsets = slot[:, None] * HEAD_DIM + of_dim[None, :]
        real = seen[:, None] & real_dim[None, :]
        # what is not seen is read as zeros: there may be anything, and a weight of 0 does not make a number of NaN
        k = _numbers(tl.load(keys + offsets, mask=real, other=0), FORM)
        v = _numbers(tl.load(values + offsets, mask=real, other=0), FORM)
        if FORM != 0:
            k *= tl.load(scales + key_head * slots + slot, mask=seen, other=0.0)[:, None]
            v *= tl.load(scales + (key_heads + key_head) * slots + slot, mask=seen, other=0.0)[:, None]
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        now = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp2(scores - now[:, None])
        less = tl.exp2(greatest - now)
        total = total * less + tl.sum(weights, 1)
        found = found * less[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        greatest = now

    places = (row * key_heads * GROUPS + heads) * PARTS + part
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        pieces + places[:, None] * HEAD_DIM + of_dim[None, :],
        found.to(pieces.dtype.element_ty),
        mask=real_heads[:, None] & real_dim[None, :],
    )
    if PARTS > 1:
        tl.store(sums + places, greatest + tl.log2(total), mask=real_heads)


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(codes, FORM: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    if FORM == 0:
        numbers = codes
    elif FORM == 1:
        numbers = codes.to(tl.float32)
    else:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return numbers


@triton.jit  # type: ignore[untyped-decorator]
def _join_parts(  # type: ignore[no-untyped-def]
    pieces, sums, output, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr
):
    place = tl.program_id(0)
    of_parts, of_dim = tl.arange(0, ALL), tl.arange(0, DIM)
    real_parts, real_dim = of_parts < PARTS, of_dim < HEAD_DIM
    each = tl.load(sums + place * PARTS + of_parts, mask=real_parts, other=-float("inf"))
    weights = tl.exp2(each - tl.max(each, 0))
    found = tl.load(
        pieces + (place * PARTS + of_parts)[:, None] * HEAD_DIM + of_dim[None, :],
        mask=real_parts[:, None] & real_dim[None, :],
        other=0.0,
    )
    joined = tl.sum(found * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output + place * HEAD_DIM + of_dim, joined.to(output.dtype.element_ty), mask=real_dim)
