"""Collective operations with gradients, on the token dimension (dimension 1) of (B, S, ...) tensors.

Each is one half of a pair whose other half is its gradient (Korthikanti et al. 2022, "Reducing Activation Recomputation in
Large Transformer Models", arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.models.uncompiled import uncompiled

# named *_tensor up to torch 2.12
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S/n, ...) of every process -> (B, S, ...)."""
    count = group.size()
    pieces = x.new_empty((count, *x.shape))
    _all_gather(pieces.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    if x.shape[0] == 1:
        return pieces.view(1, -1, *x.shape[2:])
    return pieces.transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over processes of (B, S, ...), a run of S/n tokens for each: (B, S/n, ...)."""
    count = group.size()
    size = x.shape[1] // count
    pieces = x.view(x.shape[0], count, size, *x.shape[2:]).transpose(0, 1).contiguous()
    mine = x.new_empty((x.shape[0], size, *x.shape[2:]))
    _reduce_scatter(mine, pieces.view(-1, *mine.shape[1:]), group=group)
    return mine


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over processes, for each."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return gather_tokens(x, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return scatter_tokens(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return scatter_tokens(x, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return gather_tokens(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return add_up(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        return add_up(x, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


@uncompiled
def enter(x: Tensor, group: dist.ProcessGroup, *, split: bool) -> Tensor:
    """Before matrices that are shared out: every process gets all tokens, and their gradients add up.

    Args:
        split: whether each process holds a run of the tokens (sequence parallelism), or all of them.
    """
    result: Tensor = (_Gather if split else _Copy).apply(x, group)  # type: ignore[no-untyped-call]
    return result


@uncompiled
def leave(x: Tensor, group: dist.ProcessGroup, *, split: bool) -> Tensor:
    """After them: the partial sums of all processes add up; each goes on with its run of the tokens, or with all."""
    result: Tensor = (_Scatter if split else _Sum).apply(x, group)  # type: ignore[no-untyped-call]
    return result
