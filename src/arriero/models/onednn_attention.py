"""Causal attention in fp32 on a CPU, in blocks of queries whose products are oneDNN's.

torch's kernel multiplies by MKL; see `products` for where that is slow. A block's scores are written out, softmax and all, over
the keys up to its last one; backward they are computed once more, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135,
algorithm 4), so that no more is kept than what torch's kernel keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arriero.onednn import onednn_product

# Keys are taken in multiples of so many; where there are more than `FINE` times as many, of twice, four times ... as many:
# oneDNN compiles kernels for each number of them, which a process keeps.
STEP, FINE = 128, 16
# Rows of a block, queries times heads of a group: their scores over some thousand keys should stay in the cache.
ROWS = 384
# Of shorter sequences torch's kernel is as fast.
LEAST_QUERIES = 256


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale, causal) v with grouped heads, with gradients.

    Args:
        query: (B, H, Sq, D) fp32.
        key, value: (B, KV, Skv, D), Skv no less than Sq: the queries are the last positions.

    Returns:
        (B, H, Sq, D), of which `.transpose(1, 2)` is contiguous.
    """
    output: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


def takes(query: Tensor, number: int) -> bool:
    """Whether it is made for so many queries of this kind."""
    return query.device.type == "cpu" and query.dtype == torch.float32 and number >= LEAST_QUERIES


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Of one sequence, without gradients: (H, Sq, D), (KV, Skv, D) twice -> (Sq, H, D)."""
    blocks = _Blocks(query, key, value, scale)
    found = query.new_empty(blocks.rows, len(key), blocks.groups, query.shape[2])
    for head, start, stop, end in blocks:
        weights = blocks.weights(head, start, stop, end)
        attended = onednn_product(weights, blocks.values[head, :end].t())
        found[start:stop, head] = attended.view(stop - start, blocks.groups, -1)
    return found[blocks.before : blocks.before + query.shape[1]].flatten(1, 2)


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their shapes; output and its gradient are (H, Sq, D)."""
    blocks = _Blocks(query, key, value, scale)
    grads = blocks.padded_queries(grad)
    sums = blocks.padded_queries((grad * output).sum(-1, keepdim=True))
    heads, size = len(key), key.shape[2]
    grad_query = torch.empty_like(grads)
    # columns are added to more cheaply than rows are computed: oneDNN reads what is transposed as the second factor only
    grad_key, grad_value = (key.new_zeros(heads, size, blocks.keys.shape[1]) for _ in range(2))
    for head, start, stop, end in blocks:
        weights = blocks.weights(head, start, stop, end)
        own, of_sum = grads[head, start:stop].flatten(0, 1), sums[head, start:stop].flatten(0, 1)
        grad_value[head, :, :end] += onednn_product(own.t(), weights.t())
        of_scores = onednn_product(own, blocks.values[head, :end]).sub_(of_sum).mul_(weights)
        found = onednn_product(of_scores, blocks.keys[head, :end].t())
        grad_query[head, start:stop] = found.view(stop - start, blocks.groups, size)
        grad_key[head, :, :end] += onednn_product(blocks.queries[head, start:stop].flatten(0, 1).t(), of_scores.t())
    own_rows = grad_query[:, blocks.before : blocks.before + query.shape[1]].mul_(scale)
    grad_key, grad_value = (t[:, :, : key.shape[1]].transpose(1, 2) for t in (grad_key, grad_value))
    return own_rows.transpose(1, 2).flatten(0, 1), grad_key, grad_value


class _Blocks:
    """A sequence in blocks: (head of keys, first row, last row, keys that these see or do not), one after the other.

    Rows are filled up in front, so that blocks begin at positions that are multiples of `STEP`, and behind.

    Attributes:
        queries: (KV, rows, groups, D), scaled.
        keys, values: (KV, K, D), each head's without gaps.
        before: rows in front of the first query.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        heads, queries, _ = query.shape
        length = key.shape[1]
        self.groups = heads // len(key)
        self._first = (length - queries) // STEP * STEP  # the position of the first row
        self.before = length - queries - self._first
        self.rows = -(-(self.before + queries) // STEP) * STEP
        self._block = STEP
        while self._block > STEP // 8 and self._block * self.groups > ROWS:
            self._block //= 2
        self._kv_heads = len(key)
        self.queries = self.padded_queries(query).mul_(scale)
        self.keys, self.values = (_padded(t, rounded(length)) for t in (key, value))
        self._mask = _future(STEP, query.dtype)

    def padded_queries(self, given: Tensor) -> Tensor:
        """(H, Sq, D) -> (KV, rows, groups, D)."""
        _, queries, size = given.shape
        found = given.new_zeros(self._kv_heads, self.rows, self.groups, size)
        found[:, self.before : self.before + queries] = given.view(-1, self.groups, queries, size).transpose(1, 2)
        return found

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        for head in range(self._kv_heads):
            for start in range(0, self.rows, self._block):
                yield head, start, start + self._block, rounded((self._first + start) // STEP * STEP + STEP)

    def weights(self, head: int, start: int, stop: int, end: int) -> Tensor:
        """What each row gives to each key, (queries * groups, end)."""
        scores = onednn_product(self.queries[head, start:stop].flatten(0, 1), self.keys[head, :end])
        place = (self._first + start) % STEP
        diagonal, seen = self._first + start - place, scores.view(stop - start, self.groups, end)
        seen[:, :, diagonal : diagonal + STEP] += self._mask[place : place + stop - start, None]
        seen[:, :, diagonal + STEP :] = -math.inf
        return torch.softmax(scores, -1)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows = zip(query, key, value, strict=True)
        output = torch.stack([attend(*row, scale) for row in rows]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        rows = zip(query, key, value, output, grad, strict=True)
        found = zip(*(_attend_backward(*row, ctx.scale) for row in rows), strict=True)
        return (*(torch.stack(grads) for grads in found), None)


def rounded(keys: int) -> int:
    """The next of the numbers of keys that are taken: eight for each doubling."""
    step = STEP
    while keys > FINE * step:
        step *= 2
    return -(-keys // step) * step


def _padded(given: Tensor, length: int) -> Tensor:
    """(KV, S, D) with zeros behind; as it is where there are none to add and each head's rows lie without gaps."""
    if given.shape[1] == length and given[0].is_contiguous():
        return given
    found = given.new_zeros(len(given), length, given.shape[2])
    found[:, : given.shape[1]] = given
    return found


@cache
def _future(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size), added to scores: nothing is seen behind the diagonal."""
    with torch.inference_mode(False):
        return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)
