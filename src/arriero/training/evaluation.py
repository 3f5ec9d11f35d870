"""What an objective tells of held-out rows: loss, perplexity and token accuracy, or the rewards of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from arriero.data.batch import Batch, LazyBatches
from arriero.data.steps import DataShare, share_out
from arriero.errors import TrainingError
from arriero.models.llama import LlamaForCausalLM
from arriero.models.products import fast_products
from arriero.parallel.processes import Processes
from arriero.training.callbacks.stop_signals import asked_to_stop
from arriero.training.execution import Execution, Sums
from arriero.training.precision import NOTHING, first_non_finite_parameter


class EvaluationStopped(Exception):
    """A signal that is to end the run came while held-out rows were scored."""


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

    Raises:
        EvaluationStopped: in every process, if a signal is to end the run that this is a part of.
    """
    layers = execution.layers
    processes = layers.parallel.processes if layers.parallel is not None else Processes()
    share = DataShare(processes.data_rank, processes.layout.data)
    total = Sums.nothing(layers.objective)
    was_training = layers.model.training
    layers.model.eval()
    own = share_out(batches, share)
    try:
        with fast_products():
            while group := list(islice(own, execution.batches_at_once)):
                if asked_to_stop(processes):
                    raise EvaluationStopped
                total += execution.score(group)
                if on_rows:
                    on_rows(sum(batch.rows for batch in group))
    finally:
        layers.model.train(was_training)
    loss, count, *statistics = processes.sum([total.loss, total.count, *total.statistics])
    return layers.objective.evaluation(loss, count, statistics)


def check_finite(model: LlamaForCausalLM, folder: Path, loss: float, processes: Processes) -> None:
    """Refuse to tell a score of stored weights that is no number.

    Args:
        folder: where the weights are from.

    Raises:
        TrainingError: naming the first weight that is no number, or the number format that overflows.
    """
    if math.isfinite(loss):
        return
    told = processes.exchange(first_non_finite_parameter(model))  # each holds its own part of the model
    culprit = next((found for found in told if found != NOTHING), None)
    if culprit is not None:
        raise TrainingError(
            f"{folder}: {culprit} has values that are infinite or no numbers, so the loss is {loss}: "
            "take an earlier checkpoint, or fetch the model again"
        )
    raise TrainingError(
        f"{folder}: the loss of these rows is {loss} though every weight is finite: it overflows in "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')}; try --dtype bfloat16 or float32"
    )
