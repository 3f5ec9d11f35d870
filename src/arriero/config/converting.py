"""Turning a model or adapter into another format."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.model import DTYPES
from arriero.config.option import REQUIRED, OptionGroup, option

GGUF_TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
)
GGUF_ALIASES = ("q5_k", "q4_k")
MAX_SHARD_SIZE = "5GB"


@dataclass(kw_only=True)
class ConvertOptions(OptionGroup):
    """Conversion."""

    model_name_or_path: str = option(
        REQUIRED,
        "a model or adapter of any format (folder or .gguf file), a named model or a Hub id",
        aliases=("input", "model"),
        positional=True,
    )
    output_dir: str = option(
        REQUIRED, "folder to write; a name that ends in .gguf: file to write", aliases=("output_path",), positional=True
    )
    to: str = option(
        "auto",
        "format written (model and peft mean hf); auto: gguf if the output's name ends so, else hf; quantized: the integers "
        "that a run of finetune --qat was trained for",
        ("auto", "hf", "gguf", "paddle", "meta", "quantized", "model", "peft"),
    )
    dtype: str = option(
        "auto",
        "type of the weights written; auto: as they are, float32 of a quantised model",
        tuple(DTYPES),
    )
    gguf_type: str = option(
        "auto",
        f"number format of a GGUF file, as llama.cpp calls it: {', '.join((*GGUF_TYPES, *GGUF_ALIASES))} (q4_k is q4_k_m, "
        "q5_k is q5_k_m); auto: as --dtype says",
        ("auto", *GGUF_TYPES, *GGUF_ALIASES),
    )
    max_shard_size: str = option(MAX_SHARD_SIZE, "largest weight file, e.g. 500MB; a larger model is cut into several")
    tensor_parallel_degree: int = option(
        1, "above 1: write one weight file a process, cut as so many tensor-parallel processes hold it", minimum=1
    )
    pipeline_parallel_degree: int = option(1, "the same for the processes of a pipeline, by layers", minimum=1)
    base_model: str | None = option(
        None,
        "of an adapter: the model it is for (default: what the adapter says), whose config.json is read; --to quantized: its "
        "weights too",
    )
    verify: bool | None = option(
        None,
        "compare every tensor with the original's, and the logits of a prompt (default: for models under 2e9 parameters)",
    )
    overwrite_output_dir: bool = option(False, "replace a model that is in the output folder")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = DTYPES[self.dtype]
