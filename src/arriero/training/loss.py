"""Cross-entropy on top of the output head without ever holding the logits of all positions.

Rows without a label are dropped before the projection; the rest goes through the head a chunk at a time, each chunk's
gradient being formed while its logits are at hand. Memory is one chunk of logits instead of (tokens, vocabulary); the
idea is that of Hsu et al. 2024, "Liger Kernel" (arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.data.sft import IGNORE

# fp16 sums over rows reach its greatest number, 65,504; a chunk's sum is added up in fp32
FP16_CHUNK = 4096
CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in fp32, and as much again for their softmax


@dataclass(frozen=True)
class LossSums:
    """Sums over labelled positions; divide by `tokens` for the mean."""

    loss: Tensor  # scalar fp32; carries the gradient
    correct: Tensor  # scalar int64: positions whose most likely token is the label; counted only without gradients
    tokens: int


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> LossSums:
    """Sum of the cross-entropy of ``hidden @ weight.T`` over the labelled positions.

    Args:
        hidden: (..., H) final hidden states.
        weight: (V, H) output head.
        labels: (...) int64, `IGNORE` where nothing is to be predicted.
        label_smoothing: share of the target's probability spread evenly over the vocabulary
            (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    labels = labels.reshape(-1)
    keep = (labels != IGNORE).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep)
    targets = labels.index_select(0, keep)
    loss, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets, label_smoothing, torch.is_grad_enabled()
    )
    return LossSums(loss, correct, int(targets.numel()))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, smoothing, grad_enabled):  # type: ignore[no-untyped-def]
        vocabulary = weight.shape[0]
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
        # needs_input_grad does not know of no_grad
        need_rows, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        train = need_rows or need_weight
        # half-precision inputs are multiplied in half precision, everything after the logits is fp32
        compute = (
            torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else weight.dtype
        )
        if compute == torch.float16:
            chunk = min(chunk, FP16_CHUNK)
        head = weight.to(compute)
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        correct = torch.zeros((), dtype=torch.int64, device=rows.device)
        grad_rows = torch.empty_like(rows, dtype=torch.float32) if need_rows else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        if grad_weight is not None and not targets.numel():
            grad_weight.zero_()
        for start in range(0, targets.numel(), chunk):
            part = rows[start : start + chunk].to(compute)
            target = targets[start : start + chunk].unsqueeze(1)
            logits = F.linear(part, head).float()
            likeliest = logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target)
            if not train:
                correct += (logits.argmax(1, keepdim=True) == target).sum()
            if smoothing:
                loss -= smoothing / vocabulary * logits.sum()
            # log sum exp from the softmax: its greatest entry is exp(likeliest) / sum, and never below 1 / vocabulary
            probabilities = logits.softmax(1)
            log_sum = likeliest - probabilities.amax(1, keepdim=True).log_()
            loss += (log_sum - (1.0 - smoothing) * target_logits).sum()
            del logits
            if train:
                grad = probabilities
                if smoothing:
                    grad -= smoothing / vocabulary
                grad.scatter_add_(1, target, torch.full_like(target, smoothing - 1.0, dtype=grad.dtype))
                low = grad.to(compute)
                if grad_rows is not None:
                    grad_rows[start : start + chunk] = low @ head
                if grad_weight is None:
                    continue
                if compute == torch.float32:
                    grad_weight.addmm_(low.t(), part, beta=0.0 if start == 0 else 1.0)  # beta 0: not even read
                elif start == 0:
                    grad_weight.copy_(low.t() @ part)
                else:
                    grad_weight += low.t() @ part
        ctx.save_for_backward(*(g for g in (grad_rows, grad_weight) if g is not None))
        ctx.needs, ctx.dtypes = (need_rows, need_weight), (rows.dtype, weight.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _grad_correct):  # type: ignore[no-untyped-def]
        saved = list(ctx.saved_tensors)
        # the factor (1 / token count, times the loss scale) is applied in fp32, before rounding to the inputs' dtypes
        grads = [
            (saved.pop(0) * grad_loss).to(dtype) if needed else None
            for needed, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None
