"""Weights (and activations) in few bits: while training, of a frozen base, and after training."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.errors import ConfigError

QUANT_TYPES = {
    "weight_only_int8": "int8",
    "weight_only_int4": "int4",
    "int8": "int8",
    "int4": "int4",
    "nf4": "nf4",
    "fp8": "fp8",
    "a8w8": "a8w8",
}


@dataclass(kw_only=True)
class QuantizationOptions(OptionGroup):
    """Quantization in training."""

    quantize_base: str | None = option(
        None,
        "hold the frozen base model's linear layers in few bits: nf4 (QLoRA) or int8; the adapter is trained as ever",
        ("nf4", "int8"),
    )
    qlora: bool = option(False, "the same as --quantize_base nf4", aliases=("load_in_4bit",))
    load_in_8bit: bool = option(False, "the same as --quantize_base int8")
    qat: bool = option(False, "train with weights (and activations) rounded as the quantized model will round them")
    qat_type: str = option(
        "A8W8", "bits of activations (A) and weights (W); W4: weights only", ("A8W8", "W4", "A8W4"), only_with="qat"
    )
    qat_group_size: int | None = option(
        None,
        "inputs of an output channel that share a scale of weights, -1 for all; default: -1 for 8 bits, 32 for 4",
        minimum=-1,
        only_with="qat",
    )
    qat_activation: str = option(
        "learned",
        "how the ranges of the inputs (A8) follow the data: by gradients, or as moving averages of their greatest magnitudes",
        ("learned", "moving_average"),
        only_with="qat",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for short, kind in ((self.qlora, "nf4"), (self.load_in_8bit, "int8")):
            if short and self.quantize_base not in (None, kind):
                raise ConfigError(
                    "--quantize_base, --qlora (--load_in_4bit) and --load_in_8bit name different types: keep one of them"
                )
            self.quantize_base = kind if short else self.quantize_base
        if self.quantize_base is not None and self.qat:
            raise ConfigError(
                f"--quantize_base {self.quantize_base} and --qat do not go together: rounding is learned on weights that are "
                "held in full; drop one of them"
            )


@dataclass(kw_only=True)
class QuantizeOptions(OptionGroup):
    """Quantization after training."""

    output_path: str = option(
        REQUIRED,
        "folder of the quantized model; what is not quantized, and scales, are written in --dtype (auto: as they are stored)",
        aliases=("output_dir",),
    )
    quant_type: str = option(
        "int8",
        "what linear layers become; integers of 8 or 4 bits, nf4 (4-bit NormalFloat), fp8 (e4m3), or a8w8: 8 bits for weights "
        "and their inputs. weight_only_int8 = int8, weight_only_int4 = int4",
        tuple(QUANT_TYPES),
    )
    quant_method: str = option(
        "rtn",
        "how integers are found: rtn: the nearest, in a range with the least squared error; gptq: so that the layer's outputs "
        "are kept; awq: weights that meet large inputs first made larger",
        ("rtn", "gptq", "awq"),
    )
    group_size: int | None = option(
        None,
        "inputs of an output channel that share a scale, -1 for all; default: for int4 the largest of 128, 64 and 32 that fits "
        "the model, for nf4 64 (or 32), else -1",
        minimum=-1,
    )
    activation_scale: str = option(
        "dynamic",
        "of a8w8, the range of a layer's inputs: dynamic: of each token; static: one for all, the greatest on --data_file",
        ("dynamic", "static"),
    )
    data_file: str | None = option(
        None,
        "text (.txt) or rows (.jsonl and others) to calibrate on; the end of what is read is kept to measure perplexity on",
    )
    calibration_samples: int = option(128, "pieces of text to calibrate on", minimum=1, only_with="data_file")
    calibration_length: int | None = option(
        None,
        "tokens of a piece; default: 512, or the model's context where that is less",
        minimum=8,
        only_with="data_file",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quant_type = QUANT_TYPES[self.quant_type]
        if self.group_size == 0:
            raise ConfigError("--group_size is 0: give at least 1, or -1 for a whole output channel")
        integers = self.quant_type in ("int8", "int4", "a8w8")
        if self.quant_method != "rtn" and not integers:
            raise ConfigError(
                f"--quant_method {self.quant_method} finds integers, --quant_type {self.quant_type} is none: give int8, int4 "
                "or a8w8, or leave out --quant_method"
            )
        if self.quant_method != "rtn" and self.data_file is None:
            raise ConfigError(f"--quant_method {self.quant_method} calibrates on text: give --data_file")
        if self.activation_scale == "static" and self.quant_type != "a8w8":
            raise ConfigError(
                f"--activation_scale static is for --quant_type a8w8, --quant_type {self.quant_type} rounds no inputs: drop one"
            )
        if self.activation_scale == "static" and self.data_file is None:
            raise ConfigError("--activation_scale static finds ranges on text: give --data_file")
        if self.quant_type == "fp8" and self.group_size not in (None, -1):
            raise ConfigError("--quant_type fp8 has one scale for each output channel: leave out --group_size")
