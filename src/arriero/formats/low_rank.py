"""What a low-rank adapter added to a weight matrix, as two factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the largest singular value: directions that are less count as none, as fp32 would lose them in the sum.
_LEAST = 1e-6


@dataclass(frozen=True)
class LowRank:
    """A matrix (out, in) that is ``up @ down``.

    Attributes:
        up: (out, rank) fp32.
        down: (rank, in) fp32.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def whole(self) -> Tensor:
        """(out, in) fp32."""
        return self.up @ self.down

    def balanced(self) -> LowRank:
        """The same matrix by orthonormal columns of `up`, all of whose numbers are of one size, which rounding likes.

        They are the singular vectors; the singular values are in `down`. Its rank is that of the matrix, and may be 0.
        """
        left, upper = torch.linalg.qr(self.up.double())
        right, lower = torch.linalg.qr(self.down.double().t())
        u, values, v = torch.linalg.svd(upper @ lower.t())
        rank = int((values > values[:1] * _LEAST).sum()) if len(values) else 0
        up, down = left @ u[:, :rank], values[:rank, None] * (v[:rank] @ right.t())
        return LowRank(up.float().contiguous(), down.float().contiguous())


def stacked(parts: Sequence[LowRank | None], rows: Sequence[int]) -> LowRank | None:
    """Of matrices of the same inputs, with so many rows each, one after the other; None where none has any.

    Each has ranks of its own: the others' are zero in its rows.
    """
    known = [part for part in parts if part is not None and part.rank]
    if not known:
        return None
    up = known[0].up.new_zeros(sum(rows), sum(part.rank for part in known))
    row = column = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None and part.rank:
            up[row : row + count, column : column + part.rank] = part.up
            column += part.rank
        row += count
    return LowRank(up, torch.cat([part.down for part in known]))
