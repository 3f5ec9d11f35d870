"""Rows as one tensor without padding: every row is a document of one packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.data.sft import IGNORE, Example


@dataclass(frozen=True)
class Batch:
    """Rows end to end.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, the token to predict at each position or -100.
        positions: (1, T) int64, counted anew in each row.
        lengths: tokens of each row; they sum to T.
        label_tokens: number of labels that are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    label_tokens: int

    @property
    def tokens(self) -> int:
        return int(self.input_ids.numel())

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        move = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("input_ids", "labels", "positions")
        }
        return Batch(lengths=self.lengths, label_tokens=self.label_tokens, **move)


def pack(examples: Sequence[Example]) -> Batch:
    """The examples as one packed batch, in the order given."""
    lengths = tuple(example.length for example in examples)
    labels = torch.tensor([label for example in examples for label in example.labels])
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]).unsqueeze(0),
        labels=labels.unsqueeze(0),
        positions=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        lengths=lengths,
        label_tokens=int((labels != IGNORE).sum()),
    )
