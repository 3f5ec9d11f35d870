"""Linear layers of a few rows as sums of products, which a compiler turns into one loop over the weights.

A matrix lies in tiles, (n, in, 2, lanes): of one input number the weights of a register of outputs, and beside them those of
outputs of the matrix's second half. So a core reads one stream, sums stay in registers to their end, and each number of the
input that is loaded serves both halves. Rows share the loop: each weight is loaded once for all of them.

Weights that 16 bits hold without loss, as those of most checkpoints, are kept in 16 bits, and widened where they are
multiplied: what is computed are the same fp32 numbers, and half as much is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# A row's results: those of the matrix's first half and of its second, (n, lanes) each.
Halves = tuple[Tensor, Tensor]


def narrowest(matrices: Iterable[Tensor]) -> torch.dtype:
    """bfloat16 or float16 if that holds all these numbers as they are, else float32."""
    left = [torch.bfloat16, torch.float16]
    for matrix in matrices:
        left = [
            dtype for dtype in left if matrix.dtype == dtype or torch.equal(matrix.to(dtype).float(), matrix.float())
        ]
        if not left:
            return torch.float32
    return left[0]


def tiled(matrix: Tensor, second: Tensor | None = None, *, lanes: int, dtype: torch.dtype) -> Tensor:
    """(out, in) in tiles; rows of zeros fill each half up.

    Args:
        second: of as many rows, to be the second half.
    """
    rows = len(matrix) if second is not None else -(-len(matrix) // 2)
    rows = -(-rows // lanes) * lanes
    first, second = (matrix, second) if second is not None else (matrix[:rows], matrix[rows:])
    whole = torch.zeros(2, rows, matrix.shape[1], dtype=dtype, device=matrix.device)
    whole[0, : len(first)], whole[1, : len(second)] = first, second
    return whole.view(2, rows // lanes, lanes, -1).permute(1, 3, 0, 2).contiguous()


def products(x: Tensor, tiles: Tensor) -> list[Halves]:
    """Of each row of x, (rows, in), which must be `stored`."""
    first, second = tiles[:, :, 0].float(), tiles[:, :, 1].float()
    return [((row[:, None] * first).sum(1), (row[:, None] * second).sum(1)) for row in x.unbind(0)]


def joined(found: Sequence[Halves]) -> Tensor:
    """(rows, 2 n lanes): the products in the matrix's order, and behind them zeros that filled it up."""
    return torch.cat([half for row in found for half in row]).view(len(found), -1)


def linear(x: Tensor, tiles: Tensor, size: int, bias: Tensor | None) -> Tensor:
    """(rows, in) -> (rows, size)."""
    y = joined(products(x, tiles))[:, :size]
    return y if bias is None else y + bias


def stored(x: Tensor) -> Tensor:
    """x, which the compiler then writes to memory first, and does not compute again for every weight."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
