"""The first values of an adapter's parameters: the same in every layout of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from arriero.adapters.dora import MAGNITUDE, start_magnitude
from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.pissa import start_factors
from arriero.models.initialization import Box, drawn


def initial_values(name: str, box: Box, shape: tuple[int, ...], seed: int) -> Tensor:
    """A box of a fresh adapter matrix, fp32 on the CPU: Kaiming-uniform noise (a = sqrt(5)) for A, zeros for B."""
    if ".lora_B." in name:
        return torch.zeros(tuple(part.stop - part.start for part in box))
    bound = 1.0 / math.sqrt(shape[1])

    def draw(values: Tensor, generator: torch.Generator) -> None:
        values.uniform_(-bound, bound, generator=generator)

    return drawn(name, box, shape, seed, draw)


class FreshAdapter:
    """Values of the adapter parameters of a model, any box of them.

    Args:
        base: the whole base weight (out, in) of the layer with this full name.
    """

    def __init__(self, config: LoRAConfig, seed: int, base: Callable[[str], Tensor]) -> None:
        self.config, self.seed, self.base = config, seed, base
        self._started: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        """The box of the parameter of this name, e.g. ``...q_proj.lora_A.weight``; `shape` is that of the whole."""
        layer, _, kind = name.partition(".lora_")
        if name.endswith(MAGNITUDE):
            return start_magnitude(self.base(layer))[box]
        if not self.config.pissa:
            return initial_values(name, box, shape, self.seed)
        return self._start(layer)[kind[0]][box]

    def _start(self, layer: str) -> dict[str, Tensor]:
        """Both factors of a layer. Its four parameters come one after the other: one is decomposed at a time."""
        if self._started[0] != layer:
            own = self.config.of_layer(layer)
            a, b = start_factors(self.base(layer), own.rank, own.scaling)
            self._started = layer, {"A": a, "B": b}
        return self._started[1]
