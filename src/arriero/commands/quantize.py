"""`arriero quantize`: post-training weight quantization."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.model import ModelOptions
from arriero.config.option import REQUIRED, OptionGroup, option

HELP = "Make the weights of a trained model smaller."


@dataclass(kw_only=True)
class QuantizeOptions(OptionGroup):
    """Quantization."""

    output_path: str = option(REQUIRED, "folder of the quantized model", aliases=("output_dir",))
    quant_type: str = option("weight_only_int8", "the scheme", ("weight_only_int8", "weight_only_int4", "a8w8"))
    group_size: int = option(-1, "weights that share a scale; -1: a whole output channel", minimum=-1)
    data_file: str | None = option(None, "rows to calibrate activations with")


OPTIONS: tuple[type, ...] = (
    ModelOptions,
    QuantizeOptions,
)


def run(model: ModelOptions, quantize: QuantizeOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("quantize", "arriero convert --dtype bfloat16 halves a float32 model")
