"""Loss, perplexity and token accuracy on labelled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

from arriero.data.batch import Batch, LazyBatches
from arriero.data.steps import DataShare, share_out
from arriero.parallel.processes import Processes
from arriero.training.execution import Execution, Sums


def evaluate_loss(
    execution: Execution,
    batches: LazyBatches | Sequence[Batch],
    on_rows: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics over every labelled token, each weighing the same; with several processes, of all their tokens.

    Args:
        batches: the same in every process, which takes its share of them.
        on_rows: called with the number of rows of this process's batches as they are done.

    Returns:
        `loss` (nats a token), `ppl` (its exponential) and `accuracy` (share of labels that are the model's first choice).
    """
    layers = execution.layers
    processes = layers.parallel.processes if layers.parallel is not None else Processes()
    share = DataShare(processes.data_rank, processes.layout.data)
    total = Sums()
    was_training = layers.model.training
    layers.model.eval()
    own = share_out(batches, share)
    while group := list(islice(own, execution.batches_at_once)):
        total += execution.score(group)
        if on_rows:
            on_rows(sum(batch.rows for batch in group))
    layers.model.train(was_training)
    loss, correct, tokens = processes.sum([total.loss, total.correct, total.tokens])
    mean = loss / max(1, tokens)
    return {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "accuracy": correct / max(1, tokens)}
