"""Log-probabilities of labels on top of the output head, without ever holding the logits of all positions.

As in `arriero.training.loss` the head is applied a chunk at a time. What the loss does with the log-probabilities is not
known here, so the backward pass computes each chunk's logits once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.data.sft import IGNORE
from arriero.models.products import add_weight_gradient, linear, product
from arriero.training.loss import VocabularyPart, chunk_rows


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, part: VocabularyPart | None = None
) -> Tensor:
    """log softmax(``hidden @ weight.T``) at the labels.

    Args:
        hidden: (..., H) final hidden states.
        weight: (V, H) output head.
        labels: (...) int64, `IGNORE` where there is none.
        part: where `weight` is a run of the head's rows. The result is of the whole vocabulary, in every process; the
            gradient of `hidden` is this process's part of a sum over processes.

    Returns:
        (N,) fp32 in nats, of the N labelled positions in their order.
    """
    labels = labels.reshape(-1)
    keep = (labels != IGNORE).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep)
    targets = labels.index_select(0, keep)
    found: Tensor = _LinearLogProbabilities.apply(rows, weight, targets, part)  # type: ignore[no-untyped-call]
    return found


class _LinearLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, vocabulary_part):  # type: ignore[no-untyped-def]
        device = rows.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        first = 0 if vocabulary_part is None else vocabulary_part.start
        head, wide = weight.to(compute), torch.promote_types(compute, torch.float32)
        count = targets.numel()
        chunk = chunk_rows(count, weight.shape[0] if vocabulary_part is None else vocabulary_part.size)
        log_sums = torch.empty(count, 1, dtype=wide, device=rows.device)
        at_target = torch.empty(count, 1, dtype=wide, device=rows.device)
        for start in range(0, count, chunk):
            run = slice(start, start + chunk)
            logits = linear(rows[run].to(compute), head).to(wide)
            local, inside = _local(targets[run], first, weight.shape[0])
            at_target[run] = logits.gather(1, local) * inside
            log_sums[run] = logits.logsumexp(1, keepdim=True)
        if vocabulary_part is not None and count:
            everyone = vocabulary_part.gather(torch.cat((log_sums, at_target), dim=1))
            log_sums, at_target = everyone[:, :, 0].logsumexp(0).unsqueeze(1), everyone[:, :, 1].sum(0).unsqueeze(1)
        ctx.save_for_backward(rows, weight, targets, log_sums)
        ctx.first, ctx.chunk, ctx.compute = first, chunk, compute
        return (at_target - log_sums).squeeze(1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weight, targets, log_sums = ctx.saved_tensors
        need_rows, need_weight = ctx.needs_input_grad[:2]
        head, wide = weight.to(ctx.compute), log_sums.dtype
        grad_rows = torch.empty_like(rows, dtype=wide) if need_rows else None
        grad_weight = torch.empty_like(weight, dtype=wide) if need_weight else None
        if grad_weight is not None and not targets.numel():
            grad_weight.zero_()
        for start in range(0, targets.numel(), ctx.chunk):
            run = slice(start, start + ctx.chunk)
            part = rows[run].to(ctx.compute)
            # d log p(target) / d logits = one at the target - softmax
            at_logits = linear(part, head).to(wide).sub_(log_sums[run]).exp_().neg_()
            local, inside = _local(targets[run], ctx.first, weight.shape[0])
            at_logits.scatter_add_(1, local, inside.to(at_logits.dtype))
            low = at_logits.mul_(grad[run].unsqueeze(1)).to(ctx.compute)
            if grad_rows is not None:
                grad_rows[run] = product(low, head)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, low, part, first=start == 0)
        return (
            None if grad_rows is None else grad_rows.to(rows.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _local(targets: Tensor, first: int, held: int) -> tuple[Tensor, Tensor]:
    """Targets among the rows of the head that are held, (N, 1) int64, and which of them are, (N, 1) bool."""
    local = targets.unsqueeze(1) - first
    return local.clamp(0, held - 1), (local >= 0) & (local < held)
