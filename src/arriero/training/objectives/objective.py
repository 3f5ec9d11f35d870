"""What every objective answers: the loss of a micro-batch as a sum, and what that sum is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from arriero.data.batch import Batch, PairedRows
from arriero.training.loss import VocabularyPart


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over what the loss is the mean of: labelled tokens, or pairs.

    Attributes:
        loss: scalar fp32; carries the gradient.
        count: how many were summed.
        statistics: (K,) float64 without gradient, further sums in the order of the objective's `statistics`.
    """

    loss: Tensor
    count: int
    statistics: Tensor

    def without_graph(self) -> ObjectiveSums:
        """The same numbers; what autograd keeps of them is let go."""
        return replace(self, loss=self.loss.detach())


class Objective(Protocol):
    """What is made smaller.

    Attributes:
        statistics: names of what is summed besides the loss.
        metrics: names of what an evaluation tells.
    """

    @property
    def statistics(self) -> tuple[str, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def count(self, batch: Batch) -> int:
        """What a batch adds to the number that the step's loss is divided by."""
        ...

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, pairs: PairedRows | None, part: VocabularyPart | None
    ) -> ObjectiveSums:
        """The sums of one micro-batch.

        Args:
            hidden: (..., H) final hidden states.
            weight: (V, H) output head, or the run of its rows that `part` says.
            labels: (...) int64, the token to predict at each position or -100.
            pairs: which rows the labels are of, where rows are compared.
        """
        ...

    def evaluation(self, loss: float, count: float, statistics: Sequence[float]) -> dict[str, float]:
        """The metrics of an evaluation from its sums."""
        ...

    def training(self, statistics: Sequence[float], count: float) -> dict[str, float]:
        """What a step tells besides its loss, from its sums."""
        ...
