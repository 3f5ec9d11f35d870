"""Pairs of answers, one preferred to the other: DPO, IPO, ORPO and SimPO.

With l the log-probability of an answer given its prompt (the sum over its tokens), m the mean over its tokens, r the
reference's, w the preferred answer and l the other, the loss of a pair is

- `dpo` (Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing e: Mitchell 2023, "A note on DPO with noisy
  preferences", cDPO): ``-(1 - e) log s(b h) - e log s(-b h)``, ``h = (l_w - r_w) - (l_l - r_l)``, s the logistic function;
- `ipo` (Azar et al. 2023, arXiv:2310.12036, equation 17): ``(h - 1 / (2 b))^2``, of means over tokens, as in TRL;
- `simpo` (Meng et al. 2024, arXiv:2405.14734, equation 6): ``-log s(b (m_w - m_l) - g)``;
- `orpo` (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7): ``-m_w - lambda log s(log odds(m_w) - log odds(m_l))``, with
  ``odds(m) = exp(m) / (1 - exp(m))``. The first term is of the answer's tokens only, each pair weighing the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.data.batch import Batch, PairedRows
from arriero.training.loss import VocabularyPart
from arriero.training.objectives.log_probabilities import linear_log_probabilities
from arriero.training.objectives.objective import ObjectiveSums

NEEDS_REFERENCE = ("dpo", "ipo")


def pair_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, pairs: PairedRows, part: VocabularyPart | None = None
) -> Tensor:
    """(P, 2) fp32: the log-probability of the chosen and of the rejected answer of every pair, summed over its tokens."""
    tokens = linear_log_probabilities(hidden, weight, labels, part=part)
    # answers lie one after the other: sums of runs, whose order of addition does not depend on the device
    return torch.stack([run.sum() for run in torch.split(tokens, list(pairs.tokens))]).view(-1, 2)


@dataclass(frozen=True)
class Preference:
    """Mean over pairs.

    Attributes:
        kind: dpo, ipo, orpo or simpo.
        beta: how strongly the reference holds (DPO, IPO), or the scale of the rewards (SimPO).
        label_smoothing: share of pairs taken to be the wrong way round (cDPO).
        gamma: margin that SimPO wants between the rewards.
        odds_weight: weight of ORPO's odds ratio, lambda.
    """

    kind: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    odds_weight: float = 0.1
    statistics: tuple[str, ...] = ("reward_chosen", "reward_rejected", "reward_accuracy")
    metrics: tuple[str, ...] = ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")

    def count(self, batch: Batch) -> int:
        return batch.pairs.count if batch.pairs is not None else 0

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, pairs: PairedRows | None, part: VocabularyPart | None
    ) -> ObjectiveSums:
        if pairs is None:  # a batch of padding: no loss, but a gradient of zeros, for which other processes wait
            nothing = linear_log_probabilities(hidden, weight, labels, part=part).sum()
            return ObjectiveSums(nothing, 0, torch.zeros(3, dtype=torch.float64, device=hidden.device))
        sums = pair_log_probabilities(hidden, weight, labels, pairs, part)
        lengths = torch.tensor(pairs.tokens, dtype=sums.dtype, device=sums.device).view(-1, 2)
        losses, rewards = self.losses(sums, lengths, pairs.reference)
        rewards = rewards.detach().double()
        right = (rewards[:, 0] > rewards[:, 1]).double()
        statistics = torch.stack((rewards[:, 0].sum(), rewards[:, 1].sum(), right.sum()))
        return ObjectiveSums(losses.sum(), pairs.count, statistics)

    def losses(self, sums: Tensor, lengths: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss (P,) of every pair and the rewards (P, 2) of its answers.

        Args:
            sums: (P, 2) log-probabilities of the chosen and the rejected answer.
            lengths: (P, 2) tokens of the answers.
            reference: (P, 2) those of the reference model; only DPO and IPO have one.
        """
        if self.kind in NEEDS_REFERENCE:
            if reference is None:
                raise ValueError(f"{self.kind} needs the log-probabilities of a reference")
            ratios = sums - reference
            rewards = self.beta * ratios
            if self.kind == "ipo":
                ratios = ratios / lengths
                return (ratios[:, 0] - ratios[:, 1] - 1.0 / (2.0 * self.beta)) ** 2, rewards
            margin = rewards[:, 0] - rewards[:, 1]
            flipped = self.label_smoothing
            return -(1.0 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin), rewards
        means = sums / lengths
        if self.kind == "simpo":
            rewards = self.beta * means
            return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self.gamma), rewards
        log_odds = means - _log_of_the_rest(means)
        ratio = F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
        return -means[:, 0] - self.odds_weight * ratio, self.odds_weight * means

    def evaluation(self, loss: float, count: float, statistics: Sequence[float]) -> dict[str, float]:
        """`loss` (a pair's mean), and the rewards: their means, and the share of pairs whose chosen answer has the greater."""
        return {"loss": loss / max(1.0, count), **self.training(statistics, count)}

    def training(self, statistics: Sequence[float], count: float) -> dict[str, float]:
        chosen, rejected, right = (total / max(1.0, count) for total in statistics)
        return {
            "reward_accuracy": right,
            "reward_margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }


def _log_of_the_rest(log_probability: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 without loss of digits (Mächler 2012, "Accurately computing log(1 - exp(-|a|))").

    An answer that rounding makes certain is given the largest probability below 1 instead.
    """
    x = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    near = x > -math.log(2.0)
    # both branches are computed; each gets arguments that keep its gradient finite where the other is taken
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
