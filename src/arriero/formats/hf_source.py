"""HF model folders as what a conversion reads from and writes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.hf import check_state, load_model, open_state, save_model
from arriero.formats.quantized import QuantizedFolder, is_quantized, plain
from arriero.formats.safe_tensors import FileTensor, LazyTensor
from arriero.formats.shared_files import PartReader
from arriero.formats.side_files import ROUNDING_FILES, read_side_files
from arriero.formats.source import ModelSource
from arriero.formats.tensor_shards import is_sharded
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.weight_shapes import weight_shapes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def open_hf(folder: str | Path) -> ModelSource:
    """The model of an HF folder: mapped, joined of one file a process, or dequantized when a tensor is loaded.

    Raises:
        FormatError: when a file is missing or broken, or the weights do not fit config.json.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors: Mapping[str, Tensor | LazyTensor]
    about: tuple[str, ...] = ()
    computing: Callable[[], LlamaForCausalLM] | None = None
    if is_sharded(folder):
        tensors = open_state(folder, config)
    elif is_quantized(config):
        tensors, about = open_state(folder, config), ("its quantized weights are dequantized",)
        if QuantizedFolder(folder, config).scheme.activation is not None:
            about += (
                "warning: its layers round their inputs to 8 bits; the converted model does not, its numbers differ",
            )
            computing = partial(load_model, folder)
        config = plain(config)
    else:
        tensors = _file_tensors(folder, config)
    ordered = {name: tensors[name] for name in weight_shapes(config)}
    rounding = read_side_files(folder, ROUNDING_FILES)
    files = read_side_files(folder)
    return ModelSource(folder, "hf", config, ordered, files, about, rounding=rounding, computing=computing)


def _file_tensors(folder: Path, config: LlamaConfig) -> dict[str, FileTensor]:
    """The tensors of plain weight files, each where it lies."""
    reader = PartReader(folder)
    found = {
        name: FileTensor(shape, reader.dtype(name), partial(reader.read, name), *reader.place(name))
        for name, shape in reader.shapes.items()
    }
    check_state(config, {name: tensor.shape for name, tensor in found.items()}, str(folder))
    for name in weight_shapes(config):
        if found[name].dtype not in _DTYPES:
            raise FormatError(f"{found[name].path}: {name} is not a float16, bfloat16, float32 or float64 tensor")
    return found


def write_hf(
    source: ModelSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an HF folder; see `save_model`.

    Args:
        dtype: to cast to; None keeps each tensor's.

    Raises:
        FormatError: when it cannot be written.
    """
    save_model(
        source.tensors,
        plain(source.config),
        target,
        max_shard_size=max_shard_size,
        dtype=dtype,
        extra_files={**source.files, **source.rounding},
        progress=progress,
    )
