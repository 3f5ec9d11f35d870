"""An adapter that starts from the base's greatest singular values (Meng et al. 2024, "PiSSA", arXiv:2404.02948).

With ``W = U S V^T``, the update starts as its first `rank` terms (equations 2 and 3): ``A0 = sqrt(S / s) V^T`` and
``B0 = U sqrt(S / s)``, ``s`` being the scaling. The paper trains them on a base with that part taken away, ``W - s B0 A0``;
here the base stays as it is and the layer computes the same function as ``W + s (B A - B0 A0)`` with frozen ``A0`` and
``B0``. So any base will do, and the file is an ordinary adapter of twice the rank: ``[A; A0]`` and ``[B, -B0]``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.lora_linear import LoRALinear
from arriero.errors import ConfigError
from arriero.quantization.linear import QuantizedLinear


class PiSSALinear(LoRALinear):
    """A linear layer with a low-rank update that counts from where it started."""

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        super().__init__(base, config)
        least = min(self.in_features, self.out_features)
        if config.rank > least:
            raise ConfigError(
                f"--lora_init pissa: a layer of {self.out_features} x {self.in_features} has {least} singular values, "
                f"too few for --lora_rank {config.rank}"
            )
        like = self.lora_A.weight
        self.lora_A0 = nn.Linear(self.in_features, config.rank, bias=False, device=like.device, dtype=like.dtype)
        self.lora_B0 = nn.Linear(config.rank, self.out_features, bias=False, device=like.device, dtype=like.dtype)
        for start in (self.lora_A0, self.lora_B0):
            start.requires_grad_(False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``[A; A0]``, (2 rank, in), and ``[B, -B0]``, (out, 2 rank)."""
        a = torch.cat((self.lora_A.weight, self.lora_A0.weight))
        b = torch.cat((self.lora_B.weight, -self.lora_B0.weight), dim=1)
        return a, b


def as_plain(config: LoRAConfig) -> LoRAConfig:
    """The configuration of the ordinary adapter that computes the same: twice the rank, the same scaling."""
    if not config.pissa:
        return config
    return replace(
        config,
        rank=2 * config.rank,
        alpha=config.alpha * (math.sqrt(2.0) if config.use_rslora else 2.0),
        pissa=False,
    )


def start_factors(base: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0, (rank, in), and B0, (out, rank), of a base weight (out, in): fp32, on its device."""
    u, s, vh = torch.linalg.svd(base.float(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root.unsqueeze(1) * vh[:rank], u[:, :rank] * root
