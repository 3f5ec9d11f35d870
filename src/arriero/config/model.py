"""Which model, from where, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


@dataclass(kw_only=True)
class ModelOptions(OptionGroup):
    """Model."""

    model_name_or_path: str = option(
        "facebook/llama-7b",
        "a folder with config.json and weights, a named model, or a Hugging Face Hub id",
        aliases=("model",),
        alone=True,
    )
    tokenizer_name_or_path: str | None = option(None, "the tokenizer's folder or name, if not the model's own")
    dtype: str = option(
        "auto",
        "type of the weights in memory; auto: that of the checkpoint, or what --fp16/--bf16 ask for",
        tuple(DTYPES),
    )
    device: str = option("auto", "auto, cpu, gpu (= cuda) or cuda:N; auto takes a GPU if there is one")
    use_flash_attention: bool = option(
        True, "use the fastest attention kernel this machine has; no: softmax(q k) v written out"
    )
    use_fused_rms_norm: bool = option(
        True, "use torch's RMSNorm kernel where the device has one; no: the formula written out"
    )
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = DTYPES[self.dtype]
        self.device = device_name(self.device)
        if not self.model_name_or_path.strip():
            raise ConfigError("--model_name_or_path is empty: give a folder, a named model or a Hub id")


def device_name(device: str) -> str:
    """The torch name of a device option (`gpu` is PaddleNLP's word for `cuda`).

    Raises:
        ConfigError: it is none of auto, cpu, gpu, cuda, cuda:N.
    """
    word = device.strip().lower()
    kind, colon, index = word.partition(":")
    kind = "cuda" if kind == "gpu" else kind
    if kind in ("auto", "cpu") and not colon:
        return kind
    if kind == "cuda" and (not colon or index.isdecimal()):
        return f"cuda:{int(index)}" if colon else kind
    raise ConfigError(f"--device is {device!r}: choose auto, cpu, gpu, cuda or cuda:N")
