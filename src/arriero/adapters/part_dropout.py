"""Dropout of what processes share out, who draw alike elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def part_dropout(x: Tensor, probability: float, part: tuple[int, int]) -> Tensor:
    """Dropout while training, from draws of its own for each part of a tensor.

    Processes that share out one matrix draw alike, because most of what they drop they all hold. Where each holds a part, it
    draws for all of them, so that the parts are dropped independently and the processes go on drawing alike.

    Args:
        part: which part `x` is, and of how many.
    """
    number, parts = part
    kept = x
    for other in range(parts):
        if other == number:
            kept = F.dropout(x, probability)
        else:
            with torch.no_grad():
                F.dropout(x, probability)
    return kept
