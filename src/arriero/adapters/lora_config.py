"""What a low-rank adapter changes, and how strongly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from arriero.errors import ConfigError
from arriero.formats.peft import of_pattern
from arriero.quantization.linear import QuantizedLinear

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BiasMode = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly.

    Attributes:
        rank: inner dimension of the update.
        alpha: strength; the update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with `use_rslora`).
        dropout: probability of dropping an input entry of the adapter branch while training.
        target_modules: last name parts of the adapted layers, or one regular expression that the full name must match,
            or "all-linear" for every linear layer but the output head.
        bias: which biases are trained: "none", "lora_only" (those of adapted layers) or "all".
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: a trained length for each row of the sum; see `arriero.adapters.dora`.
        pissa: start from the base's greatest singular values; see `arriero.adapters.pissa`.
        plus_scale: learning rate of every B divided by that of A (Hayou et al. 2024, "LoRA+", arXiv:2402.12354).
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions for the end of a layer's name (PEFT's).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str = field(default=DEFAULT_TARGETS)
    bias: BiasMode = "none"
    use_rslora: bool = False
    use_dora: bool = False
    pissa: bool = False
    plus_scale: float = 1.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigError(f"lora_rank is {rank}: a rank of at least 1 is needed")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0.0 < alpha < math.inf:
                raise ConfigError(f"lora_alpha is {alpha}: a number above 0 is needed, or the adapter does nothing")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora_dropout is {self.dropout}: a probability in [0, 1) is needed")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"lora_bias is '{self.bias}': one of none, all, lora_only is needed")
        if not 0.0 < self.plus_scale < math.inf:
            raise ConfigError(f"lora_plus_scale is {self.plus_scale}: a number above 0 is needed")
        if self.use_dora and self.pissa:
            raise ConfigError("--lora_dora and --lora_init pissa do not go together: choose one of them")

    @property
    def scaling(self) -> float:
        """Factor on the low-rank update."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def targets(self, name: str, module: nn.Module) -> bool:
        """Whether the layer with this full name is adapted."""
        if not isinstance(module, nn.Linear | QuantizedLinear):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return name != "lm_head"
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith("." + target) for target in self.target_modules)

    def of_layer(self, name: str) -> LoRAConfig:
        """The configuration of the layer with this full name: its own rank and alpha, no patterns."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank = of_pattern(self.rank_pattern, name, self.rank)
        alpha = of_pattern(self.alpha_pattern, name, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
