"""Ring attention: keys and values go around the processes that share a sequence, and none ever holds all of them.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv:2310.01889). In each of n steps
a process attends to one process's keys and values while they travel on and the next arrive; partial outputs are put together
by their log-sum-exp. Backward, keys and values go around again, and their gradients follow one step behind, back home.

Process r holds chunks r and 2n - 1 - r of a packed row. A document that reaches from one chunk into another fills the end of
the first and the beginning of the second, and there is one such document at most: what a chunk sees of an earlier one is a
rectangle without a mask (but for a sliding window), and only a chunk within itself needs causality.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.models.block_attention import Block, Kernel, attend, attend_backward
from arriero.models.cache import AttendingView
from arriero.models.uncompiled import uncompiled

Blocks = tuple[tuple[Block, ...], ...]  # by the process that the keys come from


def blocks_of(
    documents: Sequence[int], chunk: int, rank: int, size: int, window: int | None
) -> tuple[tuple[Block, ...], ...]:
    """What process `rank` of `size` computes with the keys of each process.

    Args:
        documents: the lengths of all in the row, end to end, 2 x size x chunk tokens together.
        chunk: tokens of a chunk; each process holds two, one after the other.
        window: see `Block`.
    """
    ends = list(accumulate(documents))
    own = (rank, 2 * size - 1 - rank)
    lengths = tuple(
        min(end, (number + 1) * chunk) - max(end - length, number * chunk)
        for number in own
        for end, length in zip(ends, documents, strict=True)
        if end - length < (number + 1) * chunk and end > number * chunk
    )
    found = []
    for source in range(size):
        blocks = [Block(0, 0, lengths, lengths, 0, window)] if source == rank else []
        for place, number in enumerate(own):
            for key_place, earlier in enumerate((source, 2 * size - 1 - source)):
                if earlier < number:
                    span = _span(documents, ends, chunk, number, earlier, window)
                    if span is not None:
                        queries, keys = span
                        first, distance = (key_place + 1) * chunk - keys, (number - earlier - 1) * chunk + keys
                        blocks.append(Block(place * chunk, first, (queries,), (keys,), distance, window))
        found.append(tuple(blocks))
    return tuple(found)


def _span(
    documents: Sequence[int], ends: Sequence[int], chunk: int, number: int, earlier: int, window: int | None
) -> tuple[int, int] | None:
    """How many of a chunk's first tokens see how many of an earlier one's last; None: no token sees any."""
    start, key_stop = number * chunk, (earlier + 1) * chunk
    document = bisect_right(ends, key_stop - 1)  # that of the earlier chunk's last token
    stop, key_start = min(ends[document], start + chunk), max(ends[document] - documents[document], key_stop - chunk)
    if window is not None:  # each query sees its own place and the window - 1 before it
        stop, key_start = min(stop, key_stop - 1 + window), max(key_start, start - window + 1)
    return (stop - start, key_stop - key_start) if stop > start and key_stop > key_start else None


@dataclass(frozen=True, eq=False)
class RingAttention(AttendingView):
    """Attention of one process's tokens of a packed row, whose other tokens the other processes of the group have.

    Attributes:
        group: the processes; `rank` is this one's place in it, of `size`.
        documents: lengths of all documents of the row.
        chunk: tokens of each of the two chunks of a process.
        kernel: what a block is computed by; default the one for the device.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    documents: tuple[int, ...]
    chunk: int
    kernel: Kernel | None = None
    _blocks: dict[int | None, Blocks] = field(default_factory=dict, repr=False)

    @uncompiled
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int = 0,  # all layers attend alike
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """softmax(q k^T * scale) v over the keys of all processes that the local queries may see, with gradients.

        Args:
            query: (1, H, T/n, D), of the local tokens.
            key, value: (1, KV, T/n, D), of the local tokens.

        Returns:
            (1, H, T/n, D).
        """
        # autocast leaves rotated queries and keys wider than values; attention would round them alike
        both = torch.stack([key[0].to(value.dtype), value[0]]).transpose(1, 2).contiguous()  # (2, T/n, KV, D)
        output = _Ring.apply(  # type: ignore[no-untyped-call]
            query[0].to(value.dtype).transpose(0, 1).contiguous(), both, self, self.blocks(sliding_window), scale
        )
        heads: Tensor = output.transpose(0, 1)[None]
        return heads

    def blocks(self, window: int | None) -> Blocks:
        """`blocks_of` this process; made once for all layers."""
        if window not in self._blocks:
            self._blocks[window] = blocks_of(self.documents, self.chunk, self.rank, self.size, window)
        return self._blocks[window]

    def around(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The tensors of all processes, this one's first, each with whose it is; the next travels while one is used."""
        held = own
        for step in range(self.size):
            passing = Passing(self, held) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, held
            if passing is not None:
                held = passing.received()


class Passing:
    """A tensor on its way to the next process of a ring, and one of the same shape coming from the process before."""

    def __init__(self, ring: RingAttention, sent: Tensor) -> None:
        self._sent, self._received = sent, torch.empty_like(sent)  # both must live until they have travelled
        following, before = (
            dist.get_global_rank(ring.group, (ring.rank + step) % ring.size) for step in (1, ring.size - 1)
        )
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, following, ring.group),
                dist.P2POp(dist.irecv, self._received, before, ring.group),
            ]
        )

    def received(self) -> Tensor:
        """What came; waits for both."""
        for work in self._works:
            work.wait()
        return self._received


class _Ring(torch.autograd.Function):
    """Queries (T/n, H, D), keys and values (2, T/n, KV, D) -> (T/n, H, D)."""

    @staticmethod
    def forward(ctx, query, both, ring, blocks, scale):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(query.dtype, torch.float32)
        total = query.new_zeros(query.shape, dtype=wide)
        log_sum = query.new_full(query.shape[:2], float("-inf"), dtype=wide)
        for source, (keys, values) in ring.around(both):
            for block in blocks[source]:
                rows = block.queries
                output, part = attend(query[rows], keys[block.keys], values[block.keys], block, scale, ring.kernel)
                together = torch.logaddexp(log_sum[rows], part)
                total[rows] *= (log_sum[rows] - together).exp()[..., None]
                total[rows] += output * (part - together).exp()[..., None]
                log_sum[rows] = together
        output = total.to(query.dtype)
        ctx.save_for_backward(query, both, output, log_sum)
        ctx.ring, ctx.blocks, ctx.scale = ring, blocks, scale
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, both, output, log_sum = ctx.saved_tensors
        ring, grad = ctx.ring, grad.contiguous()
        of_query = torch.zeros_like(query, dtype=log_sum.dtype)
        own, behind = torch.zeros_like(both, dtype=log_sum.dtype), None
        for source, held in ring.around(both):
            part = own if source == ring.rank else torch.zeros_like(own)
            for block in ctx.blocks[source]:
                rows, (keys, values) = block.queries, held[:, block.keys]
                given = (grad[rows], query[rows], keys, values, output[rows], log_sum[rows])
                gradients = attend_backward(*given, block, ctx.scale, ring.kernel)
                of_query[rows] += gradients[0]
                part[0, block.keys] += gradients[1]
                part[1, block.keys] += gradients[2]
            if source == ring.rank:  # the first; what the others find of it comes home at the end
                continue
            if behind is not None:
                part += behind.received()
            behind = Passing(ring, part)
        if behind is not None:
            own += behind.received()
        return of_query.to(query.dtype), own.to(both.dtype), None, None, None
