"""What an export reads: a model of any format, with its adapter merged, the integers it was trained for, or its prefix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from arriero.adapters.lora import adapted_layers, apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.adapters.prefix_files import BOTH, open_prefix, parameter_name
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.adapter_tokenizer import with_adapters_tokenizer
from arriero.engine.loading import load, model_folder
from arriero.engine.qat import convert_trained
from arriero.errors import ConfigError
from arriero.formats import peft
from arriero.formats.bundle_folder import is_bundle
from arriero.formats.detection import ADAPTERS, detect
from arriero.formats.low_rank import LowRank
from arriero.formats.opening import open_model
from arriero.formats.parts import Placement
from arriero.formats.quantized import QuantizedFolder, is_quantized, plain
from arriero.formats.side_files import read_side_files
from arriero.formats.source import ModelSource
from arriero.formats.tensor_shards import is_sharded
from arriero.formats.tied_head import read_config
from arriero.models.weight_shapes import weight_shapes
from arriero.quantization.linear import dequantize_layers
from arriero.quantization.qat import read_settings
from arriero.quantization.schemes import IntegerWeights


@contextmanager
def export_source(options: ModelOptions, adapter: AdapterPathOptions) -> Iterator[Path | ModelSource]:
    """The model to export, as long as the block runs: an HF folder whose files are read as they are, or a source that an
    adapter was merged into, or of another format.

    What was trained with rounded weights becomes the quantized folder that it was trained for.

    Raises:
        ConfigError: an adapter in the place of a model.
        FormatError: what is broken, or does not belong together.
    """
    path = Path(options.model_name_or_path).expanduser()
    if not path.exists():
        path = model_folder(options.model_name_or_path, options.cache_dir)
    trained = Path(adapter.lora_path) if adapter.lora_path else path
    settings = read_settings(trained) if trained.is_dir() else None
    if settings is not None:
        if adapter.lora_path:
            _check_trained_base(trained, path, options)
        if settings.rounds_inputs:
            _warn(f"inputs of layers are not rounded with the ranges of the training ({settings})")
        with TemporaryDirectory(prefix="arriero-export-") as name:
            folder = Path(name) / "model"
            cache = Path(options.cache_dir).expanduser() if options.cache_dir else None
            convert_trained(trained, folder, cache_dir=cache, max_shard_size=5 * 10**9, dtype=None)
            yield folder
        return
    if adapter.lora_path:
        yield _merged(options, path, trained)
        return
    if is_bundle(path):
        raise ConfigError(f"--model_path {path} is a bundle already: give the model it was made from")
    found = detect(path)
    if found.kind in ADAPTERS:
        raise ConfigError(
            f"--model_path {path} is an adapter: give its base there and this folder as --lora_path, or --prefix_path"
        )
    if found.format == "hf" and path.is_dir() and not is_sharded(path):
        _warn_of_input_rounding(path)
        yield path
        return
    with open_model(found) as source:
        yield source


def _check_trained_base(lora_path: Path, folder: Path, options: ModelOptions) -> None:
    """What was trained with rounding is computed from the base that it was trained with."""
    base = peft.load_adapter(lora_path)[0].base_model_name_or_path
    if base is not None and model_folder(base, options.cache_dir).resolve() != folder.resolve():
        raise ConfigError(
            f"--lora_path {lora_path} was trained with rounding on {base}: give that as --model_path, and not {folder}"
        )


def _merged(options: ModelOptions, folder: Path, lora_path: Path) -> ModelSource:
    """The model, rounded as in the adapter's training, with a LoRA adapter merged into its weights, in fp32."""
    stored, state = peft.load_adapter(lora_path)
    loaded = load(replace(options, device="cpu", dtype="float32"), adapters=[str(lora_path)])
    names = dequantize_layers(loaded.model)
    if names and loaded.scheme is None:
        _warn_of_input_rounding(folder)
        _warn(
            f"the base is quantized: {len(names)} layers are dequantized for the adapter, and rounded again as --weights says"
        )
    apply_lora(loaded.model, from_peft(stored), fresh=False)
    load_adapter_state(loaded.model, state)
    updates = {f"{name}.weight": LowRank(*layer.update_factors()) for name, layer in adapted_layers(loaded.model)}
    merge_lora(loaded.model)
    config = plain(loaded.model.config)
    weights = loaded.model.state_dict()
    files = with_adapters_tokenizer(read_side_files(folder), lora_path, config.vocab_size)
    tensors = {name: weights[name] for name in weight_shapes(config)}
    return ModelSource(folder, "hf", config, tensors, files, updates=updates)


def prefix_array(prefix_path: str, model: Path | ModelSource, base_model: str) -> npt.NDArray[np.float32]:
    """A stored prefix as the keys and values that a bundle begins with: (layers, 2, KV, P, D).

    Raises:
        FormatError: a broken prefix, or one for another model.
    """
    config = model.config if isinstance(model, ModelSource) else read_config(model)
    stored = open_prefix(prefix_path, config, base_model)
    shape = (stored.config.length, config.num_key_value_heads * config.head_dim)
    rows = [
        stored.read(parameter_name(layer, which), Placement.whole(shape)).float().numpy()
        for layer in range(config.num_hidden_layers)
        for which in BOTH
    ]
    heads = np.stack(rows).reshape(
        config.num_hidden_layers, 2, stored.config.length, config.num_key_value_heads, config.head_dim
    )
    return np.ascontiguousarray(heads.transpose(0, 1, 3, 2, 4))


def stored_bits(model: Path | ModelSource) -> int | None:
    """Of the integers that a quantized HF folder has for its layers, which an export can keep; None for any other model."""
    if isinstance(model, ModelSource):
        return None
    config = read_config(model)
    scheme = QuantizedFolder(model, config).scheme if is_quantized(config) else None
    return scheme.integer.bits if isinstance(scheme, IntegerWeights) else None


def _warn_of_input_rounding(folder: Path) -> None:
    """No bundle rounds what goes into a layer, as a model of 8-bit activations does."""
    config = read_config(folder)
    scheme = QuantizedFolder(folder, config).scheme if is_quantized(config) else None
    if scheme is not None and scheme.activation is not None:
        _warn(f"inputs of layers are not rounded as in {folder} ({scheme}): a bundle computes with exact ones")


def _warn(text: str) -> None:
    print(f"arriero: warning: {text}", file=sys.stderr)
