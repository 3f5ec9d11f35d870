"""How a model becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.model import DTYPES, device_name
from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

FORMATS = ("onnx", "torch", "aoti", "gguf")
# What --dtype means in the words of --weights.
_WEIGHTS_OF = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(kw_only=True)
class ExportOptions(OptionGroup):
    """Export."""

    model_name_or_path: str = option(
        "checkpoints/",
        "the model: a folder or .gguf file of any format, a named model or a Hub id",
        aliases=("model_path", "model"),
        alone=True,
    )
    output_path: str = option(
        "inference/llama", "folder of the bundle; arriero infer finds it by --model_dir and prefix"
    )
    format: str = option(
        "onnx",
        "what runs the bundle: onnx (ONNX Runtime), torch, aoti (compiled by torch for processors like this one), gguf "
        "(llama.cpp)",
        FORMATS,
        aliases=("kind",),
    )
    weights: str = option(
        "auto",
        "how weights are stored; auto: what --dtype says, else the integers that a quantized model has already, else fp32 "
        "(gguf: as they are; for a GPU: bf16)",
        ("auto", "fp32", "fp16", "bf16", "int8", "int4"),
    )
    dtype: str = option("auto", "the same in the words of training: float32, float16, bfloat16", tuple(DTYPES))
    block_size: int | None = option(
        None,
        "int8, int4: consecutive inputs that share a scale, 16 to 256 (default: 64 of 8 bits, 32 of 4 bits and of "
        "integers that a model has already; of aoti always 32)",
        minimum=1,
    )
    symmetric: bool | None = option(
        None,
        "int8, int4: integers around 0; no: a zero point for each block, and of int4 an offset, which is a little slower and "
        "nearer the model (default: of int8, of blocks above 64, and of integers that a model has around 0)",
    )
    accuracy_level: int = option(
        4,
        "int8, int4: 4 rounds the inputs of products to 8 bits, which is faster; 0 and 1 do not",
        minimum=0,
        maximum=4,
    )
    head_bits: int | None = option(None, "int8, int4: bits of the output head and the embedding, 8 or 4 (default: 8)")
    context: int | None = option(
        None, "longest sequence, prompt and answer, in tokens (default: all that the model has)", minimum=2
    )
    device: str = option(
        "auto", "the device it is made for: auto (= cpu) or cpu; of torch and aoti also gpu or cuda:N, one that is here"
    )
    max_new_tokens: int = option(
        100, "length of answers, where infer is not told", aliases=("tgt_length", "max_length"), minimum=1
    )
    merge_weights: bool = option(True, "merge the adapter into the weights of the bundle", only_with="lora_path")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = DTYPES[self.dtype]
        self.device = device_name(self.device)
        if self.device.startswith("cuda") and self.format not in ("torch", "aoti"):
            raise ConfigError(
                f"--device {self.device}: bundles of --format {self.format} are made for CPUs; leave it out, or use --format "
                "torch or aoti"
            )
        if not self.merge_weights:
            raise ConfigError(
                "--merge_weights no: a bundle holds one set of weights; leave it out, or use predict or chat"
            )
        for name in ("model_name_or_path", "output_path"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty")
        if self.dtype != "auto":
            meant = _WEIGHTS_OF[self.dtype]
            if self.weights not in ("auto", meant):
                raise ConfigError(f"--dtype {self.dtype} and --weights {self.weights} say two things: give one of them")
            self.weights = meant
        if self.format == "onnx" and self.weights == "bf16":
            raise ConfigError("--weights bf16 is for torch, aoti and gguf: ONNX bundles have fp32, fp16, int8 or int4")
        if self.format == "torch" and self.weights in ("int8", "int4"):
            raise ConfigError(
                f"--weights {self.weights} is for onnx, aoti and gguf: torch bundles have fp32, fp16 or bf16"
            )
        if self.format == "aoti" and self.weights in ("int8", "int4") and self.device.startswith("cuda"):
            raise ConfigError(f"--weights {self.weights} is for CPUs: a bundle for a GPU has fp32, fp16 or bf16")
        if self.format != "onnx":
            self._check_options_of_onnx()

    def _check_options_of_onnx(self) -> None:
        others = {"aoti": (), "torch": ("head_bits",), "gguf": ("head_bits", "context")}
        for name in ("block_size", "symmetric", "accuracy_level", *others[self.format]):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"--{name} is not for --format {self.format}: leave it out, or use --format onnx")
