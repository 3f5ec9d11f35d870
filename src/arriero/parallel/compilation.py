"""Compile the decoder layers, one by one: they are alike, so that one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def apply_compile(layers: Iterable[nn.Module], backend: str = "inductor", *, whole: bool = True) -> None:
    """torch.compile of each layer, in place; parameter names do not change. It happens at the first forward pass.

    Attention over packed documents stays outside (see `arriero.models.attention`): its shapes differ in every batch.

    Args:
        whole: layer by layer; else attention and feed-forward apart, with what stands between them left as it is: under
            tensor parallelism these are messages to other processes.
    """
    for layer in layers:
        if whole:
            layer.compile(backend=backend)
            continue
        for name in ("self_attn", "mlp"):
            block = layer.get_submodule(name)
            block.forward = torch.compile(block.forward, backend=backend)
