"""Loss, perplexity and token accuracy on labelled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from arriero.data.batch import Batch
from arriero.models.llama import LlamaForCausalLM
from arriero.training.precision import Precision
from arriero.training.trainer import batch_loss


@torch.no_grad()
def evaluate_loss(
    model: LlamaForCausalLM,
    batches: Iterable[Batch],
    precision: Precision,
    on_rows: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics over every labelled token, each weighing the same.

    Args:
        on_rows: called with the number of rows of each batch when it is done.

    Returns:
        `loss` (nats a token), `ppl` (its exponential) and `accuracy` (share of labels that are the model's first choice).
    """
    device = next(model.parameters()).device
    loss, correct, tokens = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device)
        if batch.label_tokens:
            with precision.context():
                sums = batch_loss(model, batch)
            loss, correct, tokens = loss + float(sums.loss), correct + int(sums.correct), tokens + sums.tokens
        if on_rows:
            on_rows(batch.rows)
    model.train(was_training)
    mean = loss / max(1, tokens)
    return {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "accuracy": correct / max(1, tokens)}
