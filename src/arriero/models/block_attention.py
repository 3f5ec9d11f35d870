"""Attention of some queries to some of their keys, with what is needed to put such parts together.

Each part comes with the log of the sum of exp(score) of every query (Milakov & Gimelshein 2018, "Online normalizer calculation
for softmax", arXiv:1805.02867). Backward, the weights follow from the scores and the sum over *all* parts, as in
FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 4), so that no part needs another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from arriero.models.attention import takes_lengths

Kernel = Literal["cpu", "flash", "written out"]


@dataclass(frozen=True, eq=False)
class Block:
    """Queries and keys that meet: documents of the same tokens (causal), or a run of queries and one of keys before it.

    Attributes:
        start, key_start: the first query and the first key, in the tensors that they are taken from.
        lengths, key_lengths: queries and keys of each document; documents stand end to end.
        distance: tokens from a document's first key to its first query: 0 for the same tokens, else no fewer than its keys.
        window: each query sees its own key and at most `window - 1` before it; every query sees some key.
    """

    start: int
    key_start: int
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    distance: int = 0
    window: int | None = None
    _offsets: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def queries(self) -> slice:
        return slice(self.start, self.start + sum(self.lengths))

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_start + sum(self.key_lengths))

    @property
    def causal(self) -> bool:
        return self.distance == 0

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """What one document's queries see, (Sq, Skv) bool; None where `causal` says it all."""
        if self.window is None or self.distance + queries <= self.window:
            return None
        index = torch.arange(max(queries, keys), device=device)
        back = self.distance + index[:queries, None] - index[:keys]
        return (back >= 0) & (back < self.window)

    def documents(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each document, counted from the block's first."""
        ends, key_ends = accumulate(self.lengths), accumulate(self.key_lengths)
        for end, length, key_end, key_length in zip(ends, self.lengths, key_ends, self.key_lengths, strict=True):
            yield slice(end - length, end), slice(key_end - key_length, key_end)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative lengths of queries and of keys, (N + 1,) int32 each, as flash kernels take them."""
        if device not in self._offsets:
            query, key = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
                for lengths in (self.lengths, self.key_lengths)
            )
            self._offsets[device] = query, key
        return self._offsets[device]


def choose_kernel(query: Tensor) -> Kernel:
    """The kernel that is there for a device and number format; "written out" is for all, and keeps a block's scores."""
    if query.device.type == "cpu":
        return "cpu"
    return "flash" if takes_lengths(query.device, query.dtype, query.shape[-1]) else "written out"


def attend(
    query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v over the keys of one block.

    Args:
        query: (Tq, H, D), the block's queries.
        key, value: (Tk, KV, D), the block's keys; head h reads group h // (H / KV).
        kernel: default `choose_kernel`.

    Returns:
        The output (Tq, H, D), and the log-sum-exp of the scores (Tq, H), in fp32 or wider.
    """
    if (kernel or choose_kernel(query)) == "flash":
        return _flash(query, key, value, block, scale)
    one = _on_cpu if (kernel or choose_kernel(query)) == "cpu" else _written_out
    parts = []
    for queries, keys in block.documents():
        seen = block.seen(queries.stop - queries.start, keys.stop - keys.start, query.device)
        parts.append(one(query[queries], key[keys], value[keys], seen, block.causal, scale))
    if len(parts) == 1:
        return parts[0]
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(sums)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    block: Block,
    scale: float,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients that comes from one block.

    Args:
        grad: (Tq, H, D), the gradient of the output.
        query, key, value: the block's.
        output, log_sum: (Tq, H, D) and (Tq, H), of the block's queries over all their keys, those of other blocks too.

    Returns:
        Of query (Tq, H, D), key and value (Tk, KV, D).
    """
    if (kernel or choose_kernel(query)) == "flash":
        return _flash_backward(grad, query, key, value, output, log_sum, block, scale)
    one = _on_cpu_backward if (kernel or choose_kernel(query)) == "cpu" else _written_out_backward
    parts = []
    for rows, keys in block.documents():
        seen = block.seen(rows.stop - rows.start, keys.stop - keys.start, query.device)
        given = (grad[rows], query[rows], key[keys], value[keys], output[rows], log_sum[rows])
        parts.append(one(*given, seen, block.causal, scale))
    if len(parts) == 1:
        return parts[0]
    of_query, of_key, of_value = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
    return of_query, of_key, of_value


# torch's kernel for CPUs, (B, H, S, D). It takes grouped heads.


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal and seen is None, attn_mask=_added(seen, query.dtype), scale=scale
    )
    return output[0].transpose(0, 1), log_sum[0].transpose(0, 1)


def _on_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, o = (x.transpose(0, 1)[None] for x in (grad, query, key, value, output))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g,
        q,
        k,
        v,
        o,
        log_sum.transpose(0, 1)[None],
        0.0,
        causal and seen is None,
        attn_mask=_added(seen, query.dtype),
        scale=scale,
    )
    of_query, of_key, of_value = (x[0].transpose(0, 1) for x in gradients)
    return of_query, of_key, of_value


def _added(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))


# Flash attention on CUDA, (T, H, D) with the documents' lengths: as torch.nn.attention.varlen calls it, which hides the sums.


def _flash(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    left, right = _reach(block)
    found = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *block.offsets(query.device),
        max(block.lengths),
        _longest(block),
        0.0,
        block.causal and left < 0,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return found[0], found[1].transpose(0, 1)


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    block: Block,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _reach(block)
    of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        log_sum.transpose(0, 1).contiguous(),
        *block.offsets(query.device),
        max(block.lengths),
        _longest(block),
        0.0,
        block.causal and left < 0,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # state of the dropout that is not there
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return of_query, of_key, of_value


def _longest(block: Block) -> int:
    """No fewer than the most keys of a document: more of them where queries see far ahead, since flash cuts how far to it."""
    return max(block.key_lengths) + (0 if block.causal else max(block.lengths))


def _reach(block: Block) -> tuple[int, int]:
    """How many keys before and after its own each query sees, -1: all. Flash puts the last query at the last key."""
    if block.causal:
        return (-1 if block.window is None else block.window - 1), 0
    queries, keys = block.lengths[0], block.key_lengths[0]
    if block.window is None or block.distance + queries <= block.window:
        return -1, -1
    return block.window - 1 - (block.distance - keys) - queries, queries


# Plain torch, for every device and format.


def _scores(
    query: Tensor, key: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped queries (KV, G, Tq, D), keys (KV, 1, Tk, D) and their scores (KV, G, Tq, Tk), in fp32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = _grouped(query, key.shape[1]).to(wide), _grouped(key, key.shape[1]).to(wide)
    scores = q @ k.mT * scale
    if seen is None and causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    return q, k, scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(T, H, D) -> (KV, H / KV, T, D)."""
    return x.reshape(x.shape[0], groups, -1, x.shape[2]).permute(1, 2, 0, 3)


def _flat(x: Tensor) -> Tensor:
    """(KV, H / KV, T, D) -> (T, H, D)."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        q, _, scores = _scores(query, key, seen, causal, scale)
        log_sum = scores.logsumexp(dim=-1, keepdim=True)
        output = (scores - log_sum).exp() @ _grouped(value, value.shape[1]).to(q.dtype)
    return _flat(output).to(query.dtype), _flat(log_sum)[..., 0]


def _written_out_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q, k, scores = _scores(query, key, seen, causal, scale)
        g, o, v = (_grouped(x, groups).to(q.dtype) for x in (grad, output, value))
        weights = (scores - _grouped(log_sum[..., None], groups)).exp()
        of_scores = weights * (g @ v.mT - (g * o).sum(dim=-1, keepdim=True)) * scale
        of_key, of_value = ((x.mT @ y).sum(dim=1, keepdim=True) for x, y in ((of_scores, q), (weights, g)))
        gradients = (_flat(x).to(query.dtype) for x in (of_scores @ k, of_key, of_value))
        of_query, of_key, of_value = gradients
    return of_query, of_key, of_value
