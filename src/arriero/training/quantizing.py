"""Quantizing a model folder after training, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from arriero.config.model import ModelOptions
from arriero.config.quantization import QuantizeOptions
from arriero.data.calibration import TextBlocks, read_blocks
from arriero.engine.loading import load, model_folder
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, quantized
from arriero.formats.safe_tensors import weight_files
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.choice import scheme_for
from arriero.quantization.post_training import needs_data, quantize_model
from arriero.quantization.schemes import WeightScheme
from arriero.training.precision import NOTHING, first_non_finite_parameter
from arriero.training.quantize_inputs import calibration_length


def quantize_folder(options: QuantizeOptions, model: ModelOptions) -> TextBlocks | None:
    """Write the quantized form of a model, after `check_inputs`.

    Returns:
        The blocks of `--data_file`, if there is one.

    Raises:
        ConfigError: a model that is quantized already.
        DataError, FormatError: a text or a model that cannot be read; all before anything is written.
    """
    folder = model_folder(model.model_name_or_path, model.cache_dir)
    config = read_config(folder)
    if quantized.is_quantized(config):
        raise ConfigError(f"{folder}: its weights are quantized already; give the original model")
    stored = _stored_dtype(folder, config)
    storage = stored if model.dtype == "auto" else getattr(torch, model.dtype)
    static = options.activation_scale == "static"
    scheme = scheme_for(options.quant_type, config, group_size=options.group_size, scale_dtype=storage, static=static)
    kept = "stay as they are" if storage == stored else f"are written in {hf.dtype_name(storage)}"
    print(f"{options.quant_method}: {scheme}; embedding, norms and output head {kept}")
    loaded = load(dataclasses.replace(model, dtype="float32"))
    broken = first_non_finite_parameter(loaded.model)
    if broken != NOTHING:
        raise FormatError(
            f"{folder}: {broken} has values that are infinite or no numbers: take an earlier checkpoint, or fetch the model "
            "again"
        )
    blocks = None
    if options.data_file is not None:
        length = calibration_length(options, config)
        if options.calibration_length is None and length == config.max_position_embeddings:
            print(f"pieces of {length} tokens, the whole context of this model")
        blocks = read_blocks(options.data_file, loaded.tokenizer, options.calibration_samples, length)
    calibration = blocks.calibration if blocks is not None and needs_data(scheme, options.quant_method) else []
    if calibration:
        print(f"calibration: {len(calibration)} blocks of {calibration[0].shape[1]} tokens of {options.data_file}")
    with tqdm(total=config.num_hidden_layers, unit="layer", desc="quantize", leave=False, disable=None) as bar:
        quantize_model(loaded.model, scheme, options.quant_method, calibration, storage, bar.update)
    save_quantized(loaded.model, scheme, storage, folder, options.output_path)
    return blocks


def save_quantized(
    model: LlamaForCausalLM, scheme: WeightScheme, dtype: torch.dtype, source: Path, output: str | Path
) -> None:
    """Write a model whose linear layers were quantized by one scheme.

    Args:
        dtype: of its plain weights.
        source: the folder whose tokenizer, generation defaults and licence come along.

    Raises:
        FormatError: a number that `dtype` cannot hold, or a folder that cannot be written.
    """
    config = quantized.with_scheme(dataclasses.replace(model.config, dtype=hf.dtype_name(dtype)), scheme)
    state = quantized.file_state(model, dtype)
    quantized.check_finite(state, source)
    hf.save_model(state, config, output, extra_files_from=source)


def _stored_dtype(folder: Path, config: LlamaConfig) -> torch.dtype:
    """Of the plain weights of a folder."""
    model, _ = hf.empty_model(folder, None, config)
    return model.model.embed_tokens.weight.dtype


def weight_bytes(folder: Path) -> int:
    """Of a folder's weight files."""
    return sum(path.stat().st_size for path in weight_files(folder))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, blocks: Sequence[Tensor]) -> float:
    """The exponential of the mean loss of predicting each token of a block from those before it.

    Args:
        blocks: (1, T) int64 each.
    """
    total, count = 0.0, 0
    for block in blocks:
        ids = block.to(model.model.embed_tokens.weight.device)
        logits = model(ids)[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(min(total / count, 700.0))
