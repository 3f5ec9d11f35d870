"""The next token: cross-entropy over every labelled position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from arriero.data.batch import Batch, PairedRows
from arriero.training.loss import VocabularyPart, linear_cross_entropy
from arriero.training.objectives.objective import ObjectiveSums


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over labelled tokens.

    Attributes:
        label_smoothing: see `arriero.training.loss.linear_cross_entropy`.
    """

    label_smoothing: float = 0.0
    statistics: tuple[str, ...] = ("correct",)
    metrics: tuple[str, ...] = ("loss", "ppl", "accuracy")

    def count(self, batch: Batch) -> int:
        return batch.label_tokens

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, pairs: PairedRows | None, part: VocabularyPart | None
    ) -> ObjectiveSums:
        sums = linear_cross_entropy(hidden, weight, labels, label_smoothing=self.label_smoothing, part=part)
        return ObjectiveSums(sums.loss, sums.tokens, sums.correct.double().view(1))

    def evaluation(self, loss: float, count: float, statistics: Sequence[float]) -> dict[str, float]:
        """`loss` (nats a token), `ppl` (its exponential), `accuracy` (share of labels that are the model's first choice)."""
        mean = loss / max(1.0, count)
        return {"loss": mean, "ppl": math.exp(min(mean, 700.0)), "accuracy": statistics[0] / max(1.0, count)}

    def training(self, statistics: Sequence[float], count: float) -> dict[str, float]:
        """Nothing: the first choices are counted without gradients only."""
        return {}
