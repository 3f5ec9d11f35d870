"""Weight-decomposed adaptation (Liu et al. 2024, "DoRA", arXiv:2402.09353).

The sum of base weight and update keeps the direction of each of its rows; the rows' lengths ``m`` (out,) are trained
(equation 5): ``y = x V^T + b`` with ``V = m / ||W + delta|| * (W + delta)``, norms over rows; a row of zeros stays one. The
norm is a constant in the backward pass (section 4.3). ``m`` starts as ``||W||``, so that training starts from the base
model exactly.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.lora_linear import LoRALinear
from arriero.quantization.linear import QuantizedLinear

MAGNITUDE = "lora_magnitude_vector"  # the last part of the name of ``m``: PEFT's


class DoRALinear(LoRALinear):
    """A linear layer whose adapted weight has rows of trained lengths.

    Attributes:
        lora_magnitude_vector: the lengths, (out,).
        group: the processes that hold the other columns of the weight; None if it is whole or cut by rows.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        super().__init__(base, config)
        like = self.lora_B.weight
        self.lora_magnitude_vector = nn.Parameter(torch.ones(self.out_features, device=like.device, dtype=like.dtype))
        self.group: dist.ProcessGroup | None = None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none.

        With dropout the base too is rescaled on what is left of the input, as PEFT does:
        ``x W^T + b + (c - 1) d(x) W^T + c d(x) delta^T`` with ``c = m / ||W + delta||``.
        """
        factor = self.factor()
        if self.training and self.dropout > 0.0:
            kept = self.dropped(x)
            y, again = self.base_product(x, bias), self.base_product(kept, None)
            return y + ((factor - 1) * again + factor * self.update(kept)).to(y.dtype)
        exact = self.adapted_product(x, None)
        y = (factor * exact).to(exact.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def factor(self) -> Tensor:
        """Length to be over length as it is, of each row of the adapted weight, (out,); 1 where a row is all zeros.

        Such a row has no direction that a length could stretch; it is the base's until the update gives it one.
        """
        norms = self.row_norms()
        zero = norms == 0
        ratio = self.lora_magnitude_vector / norms.masked_fill(zero, 1.0)
        return torch.where(zero, torch.ones_like(ratio), ratio)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Lengths of the rows of ``W + delta``, (out,); of whole rows, where processes share out the columns."""
        weight = self.base_weight() + self.delta()
        if self.group is None:
            norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
            return norms
        squares = weight.square().sum(1)
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt()

    @torch.no_grad()
    def update_factors(self) -> tuple[Tensor, Tensor]:
        up, down = super().update_factors()
        return self.factor().float().unsqueeze(1) * up, down

    def merged(self) -> Tensor:
        return self.factor().unsqueeze(1) * super().merged()


def start_magnitude(base: Tensor) -> Tensor:
    """Lengths of the rows of a base weight (out, in), fp32."""
    norms: Tensor = torch.linalg.vector_norm(base.float(), dim=1)
    return norms
