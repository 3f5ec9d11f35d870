"""Number formats in training, and memory saved by computing activations again."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class PrecisionOptions(OptionGroup):
    """Precision and memory."""

    fp16: bool = option(False, "train in float16 with a dynamic loss scale")
    bf16: bool = option(False, "train in bfloat16")
    fp16_opt_level: str = option(
        "O1",
        "O1: fp32 weights, matrix products in half precision; O2: half-precision weights, fp32 copy in the optimizer",
        ("O1", "O2"),
        only_with=("fp16", "bf16"),
    )
    fp8: bool = option(
        False,
        "train the matrices of decoder layers with products of 8-bit floats: weights and activations e4m3, gradients e5m2, one "
        "scale for each tensor; wants an H100, an RTX 40 or newer",
        only_with="bf16",
    )
    scale_loss: float = option(32768.0, "first loss scale of float16", above=0.0, only_with="fp16")
    recompute: bool = option(
        False,
        "keep only each layer's input and compute the rest again in the backward pass",
        aliases=("gradient_checkpointing",),
    )
    recompute_granularity: str = option(
        "full",
        "what is computed again: the whole layer, or only attention",
        ("full", "core_attn"),
        only_with="recompute",
    )

    torch_compile: bool = option(False, "compile each layer (torch.compile); the first step then takes a minute or so")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp16 and self.bf16:
            raise ConfigError("--fp16 and --bf16 exclude each other: keep one (bf16 needs no loss scale)")

    @property
    def compute_dtype(self) -> str:
        """float32, float16 or bfloat16: what matrix products run in."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    @property
    def fp8_products(self) -> bool:
        """Whether decoder layers are trained with products of 8-bit floats: `fp8` has no effect without `bf16`."""
        return self.fp8 and self.bf16

    @property
    def weight_dtype(self) -> str:
        """The type the trained weights are held in: half precision only at O2."""
        return self.compute_dtype if self.fp16_opt_level == "O2" else "float32"
