"""Cross-entropy on top of the output head without ever holding the logits of all positions.

Rows without a label are dropped before the projection; the rest goes through the head a chunk at a time, each chunk's
gradient being formed while its logits are at hand. Memory is one chunk of logits instead of (tokens, vocabulary); the
idea is that of Hsu et al. 2024, "Liger Kernel" (arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.data.sft import IGNORE
from arriero.models.products import add_weight_gradient, linear, product

# fp16 sums over rows reach its greatest number, 65,504; a chunk's sum is added up in fp32
FP16_CHUNK = 4096
CHUNK_ELEMENTS = 1 << 25  # logits held at once at most: 128 MiB in fp32; on a GPU as much again for their softmax
# Rows of a chunk are a multiple of this, where there are more: of 672 rows each takes an eighth less time than of 682.
ROW_TILE = 64
BLOCK_ELEMENTS = 1 << 19  # of them, worked on together on a CPU: 2 MiB, which stay in a core's cache


@dataclass(frozen=True)
class LossSums:
    """Sums over labelled positions; divide by `tokens` for the mean."""

    loss: Tensor  # scalar fp32; carries the gradient
    correct: Tensor  # scalar int64: positions whose most likely token is the label; counted only without gradients
    tokens: int


@dataclass(frozen=True)
class VocabularyPart:
    """The run of the vocabulary whose rows of the head this process holds, where several share it out.

    Attributes:
        start: first token id of the run.
        size: of the whole vocabulary.
    """

    group: dist.ProcessGroup
    start: int
    size: int

    def gather(self, values: Tensor) -> Tensor:
        """(N, K) of every process: (processes, N, K)."""
        pieces = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(pieces, values.contiguous(), group=self.group)
        return torch.stack(pieces)


def chunk_rows(rows: int, vocabulary: int) -> int:
    """How many of the rows go through a head of so many words at once: all, or an even share of them."""
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    if rows <= most:
        return max(1, rows)
    most -= most % ROW_TILE if most > ROW_TILE else 0
    share = math.ceil(rows / math.ceil(rows / most))
    return min(most, math.ceil(share / ROW_TILE) * ROW_TILE)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    part: VocabularyPart | None = None,
) -> LossSums:
    """Sum of the cross-entropy of ``hidden @ weight.T`` over the labelled positions.

    Args:
        hidden: (..., H) final hidden states.
        weight: (V, H) output head.
        labels: (...) int64, `IGNORE` where nothing is to be predicted.
        label_smoothing: share of the target's probability spread evenly over the vocabulary
            (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        part: where `weight` is a run of the head's rows. The sums are those of the whole vocabulary, in every process;
            the gradient of `hidden` is this process's part of a sum over processes.
    """
    labels = labels.reshape(-1)
    keep = (labels != IGNORE).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep)
    targets = labels.index_select(0, keep)
    loss, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets, label_smoothing, torch.is_grad_enabled(), part
    )
    return LossSums(loss, correct, int(targets.numel()))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, smoothing, grad_enabled, vocabulary_part):  # type: ignore[no-untyped-def]
        shared = vocabulary_part is not None
        vocabulary = vocabulary_part.size if shared else weight.shape[0]
        held = weight.shape[0]
        chunk = chunk_rows(targets.numel(), vocabulary)
        # needs_input_grad does not know of no_grad
        need_rows, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        train = need_rows or need_weight
        # half-precision inputs are multiplied in half precision, everything after the logits is at least fp32
        compute = (
            torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else weight.dtype
        )
        if compute == torch.float16:
            chunk = min(chunk, FP16_CHUNK)
        head, wide = weight.to(compute), torch.promote_types(compute, torch.float32)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        correct = torch.zeros((), dtype=torch.int64, device=rows.device)
        grad_rows = torch.empty_like(rows, dtype=wide) if need_rows else None
        grad_weight = torch.empty_like(weight, dtype=wide) if need_weight else None
        if grad_weight is not None and not targets.numel():
            grad_weight.zero_()
        for start in range(0, targets.numel(), chunk):
            part = rows[start : start + chunk].to(compute)
            target = targets[start : start + chunk].unsqueeze(1)
            logits = linear(part, head).to(wide)
            inside: Tensor | None = None
            if shared:
                local = target - vocabulary_part.start
                inside = (local >= 0) & (local < held)
                target = local.clamp(0, held - 1)
            target_logits = logits.gather(1, target)
            logits_sum = logits.sum() if smoothing else None
            best = None if train else logits.argmax(1, keepdim=True)
            probabilities, log_sum, likeliest = softmax(logits)
            del logits
            won = None
            if inside is not None:
                mine = log_sum
                log_sum, target_logits, won = _over_vocabulary(vocabulary_part, mine, target_logits, likeliest, inside)
                probabilities *= (mine - log_sum).exp_()
                if logits_sum is not None:
                    logits_sum = vocabulary_part.gather(logits_sum.view(1, 1)).sum()
            if best is not None:
                hit = best == target
                correct += (hit if won is None else hit & inside & won).sum()
            if logits_sum is not None:
                loss -= smoothing / vocabulary * logits_sum
            loss += (log_sum - (1.0 - smoothing) * target_logits).sum()
            if train:
                grad = probabilities
                if smoothing:
                    grad -= smoothing / vocabulary
                at_target = torch.full_like(target, smoothing - 1.0, dtype=grad.dtype)
                grad.scatter_add_(1, target, at_target if inside is None else at_target * inside)
                low = grad.to(compute)
                if grad_rows is not None:
                    grad_rows[start : start + chunk] = product(low, head)
                if grad_weight is not None:
                    add_weight_gradient(grad_weight, low, part, first=start == 0)
                del grad, low
            del probabilities  # or it would stay beside the next chunk's logits and softmax
        if shared and not train:
            dist.all_reduce(correct, group=vocabulary_part.group)
        ctx.save_for_backward(*(g for g in (grad_rows, grad_weight) if g is not None))
        ctx.needs, ctx.dtypes = (need_rows, need_weight), (rows.dtype, weight.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _grad_correct):  # type: ignore[no-untyped-def]
        saved = list(ctx.saved_tensors)
        # The factor (1 / token count, times the loss scale) is applied in fp32, before rounding to the inputs' dtypes; in place
        # where nothing asks again, for the head's gradient is large.
        times = Tensor.mul_ if _graph_is_let_go() else Tensor.mul
        grads = [
            times(saved.pop(0), grad_loss).to(dtype) if needed else None
            for needed, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None, None


def _graph_is_let_go() -> bool:
    """Whether this backward pass is the last over its graph: pipelines without bubbles make two, for inputs and for weights."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of rows (N, V), on a CPU in their place; log of the sums of exponentials and greatest logits, (N, 1) each.

    There a few rows at a time take all passes while the cache has them: over the whole, each pass would read and write memory.
    """
    if logits.device.type != "cpu":
        likeliest = logits.amax(1, keepdim=True)
        probabilities = logits.softmax(1)
        # its greatest entry is exp(likeliest) / sum, and never below 1 / V
        return probabilities, likeliest - probabilities.amax(1, keepdim=True).log_(), likeliest
    likeliest, sums = (logits.new_empty(len(logits), 1) for _ in range(2))
    block = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for rows, top, total in zip(*(torch.split(tensor, block) for tensor in (logits, likeliest, sums)), strict=True):
        torch.amax(rows, 1, keepdim=True, out=top)
        torch.sum(rows.sub_(top).exp_(), 1, keepdim=True, out=total)
        rows.div_(total)
    return logits, likeliest + sums.log_(), likeliest


def _over_vocabulary(
    part: VocabularyPart, log_sum: Tensor, target_logits: Tensor, likeliest: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the whole vocabulary: log sum exp and the target's logit, (N, 1); and whether the greatest logit is here."""
    everyone = part.gather(torch.cat((log_sum, target_logits.masked_fill(~inside, 0.0), likeliest), dim=1))
    total = everyone[:, :, 0].logsumexp(0).unsqueeze(1)
    won = everyone[:, :, 2].argmax(0).unsqueeze(1) == dist.get_rank(part.group)
    return total, everyone[:, :, 1].sum(0).unsqueeze(1), won
