"""Which module reads and writes which format; it is imported when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arriero.errors import FormatError
from arriero.formats.detection import MODELS, NAMES, Found, Kind
from arriero.formats.side_files import ROUNDING_FILES, TOKENIZER_SIDE_FILES, rounding_left_out
from arriero.formats.source import ModelSource

_READERS: dict[Kind, tuple[str, str]] = {
    "hf": ("arriero.formats.hf_source", "open_hf"),
    "hf-shards": ("arriero.formats.hf_source", "open_hf"),
    "hf-bin": ("arriero.formats.bin_folder", "open_bin_folder"),
    "gguf": ("arriero.formats.gguf.model", "open_gguf"),
    "paddle": ("arriero.formats.paddle.reader", "open_paddle"),
    "meta": ("arriero.formats.meta.reader", "open_meta"),
}
_WRITERS = {
    "hf": ("arriero.formats.hf_source", "write_hf"),
    "gguf": ("arriero.formats.gguf.model_writer", "write_gguf"),
    "paddle": ("arriero.formats.paddle.writer", "write_paddle"),
    "meta": ("arriero.formats.meta.writer", "write_meta"),
}
# What of a model or adapter of any format, tokenizer included, a new one in its folder makes obsolete. Licences stay.
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "model_state*.pdparams",
    "model_state*.pdparams.index.json",
    "consolidated.*.pth",
    "params.json",
    "adapter_config.json",
    "adapter_model*",
    "prefix_encoder.safetensors",
    "lora_config.json",
    "lora_model_state*.pdparams",
    "prefix_config.json",
    "prefix_model_state*.pdparams",
    "pre_caches.npy",
    "peft_model*.safetensors",
    "peft_model.safetensors.index.json",
    *TOKENIZER_SIDE_FILES,
    *ROUNDING_FILES,
)
_GGUF_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}
_GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Writing:
    """How a model is written.

    Attributes:
        format: hf, gguf, paddle or meta.
        dtype: to cast to; None keeps each tensor's.
        gguf_kind: number format of a GGUF file; None: the one of `dtype`, or of the widest matrix.
        max_shard_size: of a weight file in bytes (hf, paddle).
        tensor_parallel_degree: processes that share out each matrix, one file each (hf, paddle, meta).
        stages: the layers of each process of a pipeline, one file each (hf, paddle); empty: no pipeline.
    """

    format: str
    dtype: torch.dtype | None = None
    gguf_kind: str | None = None
    max_shard_size: int = 5 * 10**9
    tensor_parallel_degree: int = 1
    stages: tuple[range, ...] = ()

    def kind_for(self, source: ModelSource) -> str:
        """The number format of a GGUF file of this model."""
        if self.gguf_kind is not None:
            return self.gguf_kind
        matrices = (tensor.dtype for tensor in source.tensors.values() if len(tensor.shape) > 1)
        widest = max(matrices, key=lambda kind: kind.itemsize)
        return _GGUF_KINDS[self.dtype or widest]

    def rounds_to(self, source: ModelSource) -> torch.dtype | None:
        """What the tensors are cast to; None: nothing, or no type of torch."""
        return _GGUF_DTYPES.get(self.kind_for(source)) if self.format == "gguf" else self.dtype

    def is_lossy(self, source: ModelSource) -> bool:
        """Whether the numbers are stored in a format of few bits."""
        return self.format == "gguf" and self.kind_for(source) not in _GGUF_DTYPES


def open_model(found: Found) -> ModelSource:
    """A model of any format, none of its tensors in memory yet.

    Raises:
        FormatError: it is no model, or a broken one.
    """
    if found.kind not in MODELS:
        raise FormatError(f"{found.path}: is a {NAMES[found.kind]}, and a model is needed")
    module, name = _READERS[found.kind]
    source: ModelSource = getattr(importlib.import_module(module), name)(found.path)
    return source


def write_model(
    source: ModelSource, target: Path, how: Writing, progress: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """Write a model in any format, whole or not at all, a tensor at a time.

    Args:
        target: a folder; of GGUF a file.
        progress: told bytes done and bytes in all, after each tensor.

    Returns:
        What a user wants to know about it, a line each.

    Raises:
        FormatError: when the format cannot hold this model, or it cannot be written.
    """
    if how.format == "hf" and (how.tensor_parallel_degree > 1 or len(how.stages) > 1):
        from arriero.formats.shard_writer import write_shards

        write_shards(source, target, how.tensor_parallel_degree, how.stages or None, how.dtype, progress)
        return ()
    module, name = _WRITERS[how.format]
    write: Callable[..., Any] = getattr(importlib.import_module(module), name)
    options: dict[str, Any] = {"progress": progress}
    if how.format == "gguf":
        options["kind"] = how.kind_for(source)
    else:
        options |= {"dtype": how.dtype, "max_shard_size": how.max_shard_size}
    if how.format == "paddle":
        options["tensor_parallel_degree"] = how.tensor_parallel_degree
        options["pipeline_parallel_degree"] = max(1, len(how.stages))
    elif how.format == "meta":
        options["model_parallel_size"] = how.tensor_parallel_degree
    told = write(source, target, **options)
    notes = tuple(told) if isinstance(told, tuple) else ()
    if source.rounding and how.format != "hf":
        notes += (rounding_left_out(source.rounding, source.path, f"--to {how.format}"),)
    return notes
