"""Models that were trained with rounded weights, from the folders of their runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.lora import apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.adapters.qat import apply_qat, rounding_layers, to_quantized
from arriero.data.tokenizer_files import SIDE_FILES
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.download import resolve_model
from arriero.formats.parts import Placement
from arriero.formats.quantized import file_state, with_scheme
from arriero.formats.shared_files import PartReader
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.materialize import Values
from arriero.quantization.qat import RANGE, RANGES_FILE, QatSettings, is_range, read_settings


def apply_stored_rounding(
    model: LlamaForCausalLM, folder: Path, values: Values | None, *, column_parts: int = 1
) -> Values | None:
    """Let a model of exact weights, with its adapter beside them, round as the run in `folder` did; in place.

    With values, the layers become the integers that `arriero convert --to quantized` writes. On the meta device they round
    what each process will hold of them.

    Args:
        folder: with the `qat.json` of a run.
        values: where the weights come from if the model is on the meta device.
        column_parts: tensor-parallel processes.

    Returns:
        Where weights and ranges come from; None as `values` is.

    Raises:
        FormatError: if the ranges are missing or of another model.
    """
    settings = read_settings(folder)
    assert settings is not None
    print(f"weights rounded as in training: {settings}", file=sys.stderr)
    apply_qat(model, settings, column_parts=column_parts)
    reader = PartReader(folder / RANGES_FILE) if settings.rounds_inputs else None
    if values is None:
        _set_ranges(model, reader)
        to_quantized(model)
        return None

    def value(name: str, placement: Placement) -> Tensor:
        if reader is not None and is_range(name):
            return reader.read_part(name, placement)
        return values(name, placement)

    return value


@torch.no_grad()
def _set_ranges(model: LlamaForCausalLM, reader: PartReader | None) -> None:
    for name, layer in rounding_layers(model):
        if reader is not None and layer.input_range is not None:
            layer.input_range.copy_(reader.read_part(f"{name}.{RANGE}", Placement.whole((1,))))


def convert_trained(
    folder: Path, output: Path, *, cache_dir: Path | None, max_shard_size: int, dtype: str | None
) -> QatSettings:
    """Write the integers that a run with `--qat` trained for, as a quantized model folder.

    Args:
        folder: of the run, or one of its checkpoints; an adapter's base is the one that its configuration names.
        dtype: of what stays exact; None leaves it as it is.

    Raises:
        ConfigError: if the folder is of no such run.
        FormatError: if something in it is missing or broken.
    """
    settings = read_settings(folder)
    if settings is None:
        raise ConfigError(
            f"--to quantized: {folder} holds no run of finetune --qat; `arriero quantize` rounds any other model"
        )
    source = folder
    if (folder / "config.json").is_file():
        model = hf.load_model(folder)
    else:
        stored, state = peft.load_adapter(folder)
        if stored.base_model_name_or_path is None:
            raise FormatError(f"{folder}: {peft.ADAPTER_CONFIG} names no base model")
        source = resolve_model(stored.base_model_name_or_path, cache_dir=cache_dir)
        model = hf.load_model(source)
        apply_lora(model, from_peft(stored), fresh=False)
        load_adapter_state(model, state)
    apply_qat(model, settings)
    _set_ranges(model, PartReader(folder / RANGES_FILE) if settings.rounds_inputs else None)
    to_quantized(model)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    kind = model.model.embed_tokens.weight.dtype
    config = with_scheme(replace(model.config, dtype=hf.dtype_name(kind)), settings.stored)
    # an adapter may have been trained with another tokenizer, which is beside it then
    own = [folder / name for name in SIDE_FILES if name != "generation_config.json" and (folder / name).is_file()]
    files = {path.name: path.read_bytes() for path in own}
    hf.save_model(
        file_state(model, kind),
        config,
        output,
        max_shard_size=max_shard_size,
        extra_files_from=source,
        extra_files=files,
    )
    return settings
