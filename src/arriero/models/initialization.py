"""Fresh weights as a function of the seed, the parameter's name and the position in it.

So a process that holds a part of a parameter draws that part only, and every layout of processes starts from the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from arriero.models.config import LlamaConfig

BLOCK_ELEMENTS = 1 << 20  # drawn from one generator; a whole number of rows
Box = tuple[slice, ...]
Draw = Callable[[Tensor, torch.Generator], object]


def drawn(name: str, box: Box, shape: tuple[int, ...], seed: int, draw: Draw) -> Tensor:
    """A box of a random matrix (fp32, on the CPU), drawn block of rows by block of rows.

    Args:
        box: of the matrix, with explicit bounds.
        shape: (rows, columns) of the whole matrix.
        draw: fills a tensor from a generator.
    """
    rows, columns = box
    step = max(1, BLOCK_ELEMENTS // shape[1])
    values = torch.empty(rows.stop - rows.start, columns.stop - columns.start, device="cpu")
    for block in range(rows.start // step, -(-rows.stop // step)):
        key = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little") >> 1)
        first = block * step
        drawn_rows = torch.empty(min(step, shape[0] - first), shape[1], device="cpu")
        draw(drawn_rows, generator)
        low, high = max(rows.start, first), min(rows.stop, first + step)
        values[low - rows.start : high - rows.start] = drawn_rows[low - first : high - first, columns]
    return values


def initial_values(name: str, box: Box, shape: tuple[int, ...], config: LlamaConfig, seed: int) -> Tensor:
    """A box of a parameter as HF draws it: N(0, initializer_range) for matrices, 1 for norms, 0 for biases; fp32, CPU."""
    if len(shape) < 2:
        size = box[0].stop - box[0].start
        return torch.full((size,), 0.0 if name.endswith(".bias") else 1.0, device="cpu")

    def draw(values: Tensor, generator: torch.Generator) -> None:
        values.normal_(0.0, config.initializer_range, generator=generator)

    return drawn(name, box, shape, seed, draw)
