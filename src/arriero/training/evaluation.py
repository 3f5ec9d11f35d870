"""What an objective tells of held-out rows: loss, perplexity and token accuracy, or the rewards of pairs."""

from __future__ import annotations

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
    """The objective's metrics over every labelled token or pair, each weighing the same; of all processes together.

    Args:
        batches: the same in every process, which takes its share of them.
        on_rows: called with the number of rows of this process's batches as they are done.

    Returns:
        What `layers.objective` tells: of cross-entropy `loss`, `ppl` and `accuracy`.
    """
    layers = execution.layers
    processes = layers.parallel.processes if layers.parallel is not None else Processes()
    share = DataShare(processes.data_rank, processes.layout.data)
    total = Sums.nothing(layers.objective)
    was_training = layers.model.training
    layers.model.eval()
    own = share_out(batches, share)
    while group := list(islice(own, execution.batches_at_once)):
        total += execution.score(group)
        if on_rows:
            on_rows(sum(batch.rows for batch in group))
    layers.model.train(was_training)
    loss, count, *statistics = processes.sum([total.loss, total.count, *total.statistics])
    return layers.objective.evaluation(loss, count, statistics)
