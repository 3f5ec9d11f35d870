"""Compile the decoder layers, one by one: they are alike, so that one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def apply_compile(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """torch.compile of each layer, in place; parameter names do not change. It happens at the first forward pass.

    Attention over packed documents stays outside (see `arriero.models.attention`): its shapes differ in every batch.
    """
    for layer in layers:
        layer.compile(backend=backend)
