"""Quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class QuantizationOptions(OptionGroup):
    """Quantization-aware training."""

    qat: bool = option(False, "train with weights (and activations) rounded as the quantized model will round them")
    qat_type: str = option(
        "A8W8", "bits of activations (A) and weights (W); W4: weights only", ("A8W8", "W4", "A8W4"), only_with="qat"
    )
