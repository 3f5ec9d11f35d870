"""Adapters between the files of PEFT, PaddleNLP and llama.cpp; what is written is read back and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.prefix_files import BOTH, flatten, parameter_name
from arriero.errors import ConfigError, FormatError
from arriero.formats import peft, peft_prefix
from arriero.formats.conversion import staged_output
from arriero.formats.detection import Found
from arriero.formats.download import model_config
from arriero.formats.gguf.lora import read_gguf_lora, write_gguf_lora
from arriero.formats.narrowing import narrowed
from arriero.formats.paddle.lora import read_paddle_lora, write_paddle_lora
from arriero.formats.paddle.prefix import read_paddle_prefix, write_paddle_prefix
from arriero.formats.parts import Placement
from arriero.formats.peft import PeftLoraConfig
from arriero.formats.peft_prefix import PeftPrefixConfig
from arriero.formats.side_files import ROUNDING_FILES, read_side_files, rounding_left_out
from arriero.formats.verification import relative_difference, same_numbers
from arriero.models.config import LlamaConfig

# Rounding steps that turning a key and turning it back may cost.
_ROTATED = 4
Lora = tuple[PeftLoraConfig, dict[str, Tensor]]
Prefix = tuple[PeftPrefixConfig, dict[str, Tensor]]


def convert_adapter(
    found: Found,
    output: Path,
    to: str,
    *,
    base_model: str | None = None,
    cache_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    tensor_parallel_degree: int = 1,
) -> str:
    """Write a LoRA adapter or a prefix in another format, whole or not at all.

    Args:
        output: a folder; of GGUF a file.
        to: hf (PEFT's files), paddle, or gguf (LoRA only).
        base_model: the model that it is for; None: the one that the adapter names.
        dtype: to cast to; None keeps each tensor's. GGUF adapters are in fp32.
        tensor_parallel_degree: of Paddle's files: processes that share out the matrices, one file each.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: the format has no such adapter, or needs the base model and nothing names it.
        FormatError: the adapter is broken or not for this base, the format cannot hold it, or it cannot be written.
    """
    _check_target(found, to, dtype, tensor_parallel_degree)
    if found.kind.endswith("lora"):
        return _convert_lora(found, output, to, _Base(base_model, cache_dir), dtype, tensor_parallel_degree)
    return _convert_prefix(found, output, to, _Base(base_model, cache_dir), dtype, tensor_parallel_degree)


def _check_target(found: Found, to: str, dtype: torch.dtype | None, tp: int) -> None:
    parts = len(list(found.path.glob("*_model_state.tp*.pdparams"))) if found.format == "paddle" else 1
    changes = (dtype is not None and to != "gguf") or (to == "paddle" and (tp > 1 or parts > 1))
    if to == found.format and not changes:
        raise ConfigError(
            f"{found.path}: is a {found.name} already; say --to paddle, gguf or hf, whichever it is to become, or --dtype"
        )
    if to == "meta":
        raise ConfigError(
            f"{found.path}: is a {found.name}, and Meta's format has no adapters; merge it into its base first"
        )
    if to == "gguf" and found.kind.endswith("prefix"):
        raise ConfigError(f"{found.path}: is a {found.name}, and GGUF has no prefixes; hf and paddle have")
    if tp > 1 and to != "paddle":
        raise ConfigError(
            "an adapter is cut for tensor parallelism in Paddle's format only: drop --tensor_parallel_degree"
        )


class _Base:
    """The configuration of the model that an adapter is for, looked up when it is needed."""

    def __init__(self, name: str | None, cache_dir: Path | None) -> None:
        self.name, self.cache_dir = name, cache_dir

    def given(self) -> LlamaConfig | None:
        """Of the model that the user named."""
        return None if self.name is None else model_config(self.name, self.cache_dir)

    def needed(self, stored: str | None, found: Found) -> LlamaConfig:
        """Of the model that the user named, or else the adapter."""
        name = self.name or stored
        if not name:
            raise ConfigError(
                f"{found.path}: does not name the model it is for; add --base_model, a folder, name or Hub id"
            )
        try:
            return model_config(name, self.cache_dir)
        except (ConfigError, FormatError) as error:
            if self.name is not None:
                raise
            raise ConfigError(
                f"{found.path}: is for {name[:200]}, whose configuration is needed and cannot be had ({error}); "
                "add --base_model, a folder, name or Hub id"
            ) from error


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Raises FormatError where a number would become infinite."""
    return {name: tensor if dtype is None else narrowed(tensor, dtype, name) for name, tensor in state.items()}


def _compare(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], place: Path) -> str:
    """Raises FormatError unless two sets of tensors hold the same numbers."""
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        raise FormatError(f"{place}: {odd[0]} is in only one of the original and the converted adapter")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape or not same_numbers(tensor, found[name]):
            raise FormatError(f"{place}: {name} differs from the original: do not use this adapter")
    return f"all {len(wanted)} tensors equal"


def _read_lora(kind: str, path: Path, model: LlamaConfig | None) -> Lora:
    if kind == "gguf":
        return read_gguf_lora(path, model)
    return read_paddle_lora(path, model) if kind == "paddle" else peft.load_adapter(path)


def _convert_lora(found: Found, output: Path, to: str, base: _Base, dtype: torch.dtype | None, tp: int) -> str:
    config, state = _read_lora(found.format, found.path, base.given())
    state = _cast(state, dtype)
    left_out = ""
    if to != "hf" and state.keys() & peft.BASE_COPIES:
        left_out = f"\nwarning: left out, as {to} has no place for copies of the base's weights: "
        left_out += ", ".join(sorted(state.keys() & peft.BASE_COPIES))
        state = {name: tensor for name, tensor in state.items() if name not in peft.BASE_COPIES}
    if base.name is not None:
        config = replace(config, base_model_name_or_path=base.name)
    model = None if to == "hf" else base.needed(config.base_model_name_or_path, found)
    with staged_output(output, is_file=to == "gguf") as place:
        if model is None:
            peft.save_adapter(place, state, config)
        elif to == "gguf":
            write_gguf_lora(place, config, state, model)
        else:
            write_paddle_lora(place, config, state, model, tp)
        again, written = _read_lora(to, place, model)
        text = _compare_lora((config, state), (again, written), place)
        text += left_out + _keep_rounding(found, to, place)
    return f"rank {config.r}; {text}"


def _compare_lora(wanted: Lora, found: Lora, place: Path) -> str:
    """Raises FormatError unless two adapters change each layer alike.

    Where the format has one scale for all layers, what a layer's own differs by is multiplied into its B.
    """
    scales = {name: (_strength(wanted[0], layer), _strength(found[0], layer)) for name, layer in _layers_of(wanted[1])}
    folded = {name: pair for name, pair in scales.items() if not math.isclose(*pair, rel_tol=1e-6)}
    text = _compare(
        {name: tensor for name, tensor in wanted[1].items() if name not in folded},
        {name: tensor for name, tensor in found[1].items() if name not in folded},
        place,
    )
    for name, (scale, other) in folded.items():
        before, after = wanted[1][name], found[1].get(name)
        apart = math.inf
        if after is not None and after.shape == before.shape:
            apart = relative_difference(before.double() * scale, after.double() * other)
        if not apart <= torch.finfo(torch.float32).eps:
            raise FormatError(
                f"{place}: {name} times its scale differs from the original by {apart:.1e}: do not use this adapter"
            )
    return f"{text}, {len(folded)} with another scale but the same product" if folded else text


def _layers_of(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The name of each B, and of its layer."""
    return [(name, name.rpartition(".lora_")[0]) for name in state if ".lora_B." in name]


def _strength(config: PeftLoraConfig, layer: str) -> float:
    """What the product of a layer's matrices is multiplied by."""
    rank, alpha = config.rank_of(layer), peft.of_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _read_prefix(kind: str, path: Path, model: LlamaConfig | None) -> Prefix:
    if kind == "paddle":
        if model is None:  # `_convert_prefix` looks it up
            raise FormatError(f"{path}: a prefix of PaddleNLP needs the configuration of its model")
        stored = read_paddle_prefix(path, model)
        return stored.config, stored.state
    config = peft_prefix.read_config(path)
    encoder = peft_prefix.open_encoder(path) if config.prefix_projection else None
    if encoder is not None:
        return config, {name: encoder.read(name).clone() for name in encoder.shapes}
    reader = peft_prefix.open_embeddings(path, config)
    where = Placement.whole((config.num_virtual_tokens, config.token_dim))
    state = {
        parameter_name(layer, which): peft_prefix.read_layer(reader, config, layer, which, where).contiguous()
        for layer in range(config.num_layers)
        for which in BOTH
    }
    return replace(config, prefix_projection=False), state


def _keep_rounding(found: Found, to: str, place: Path) -> str:
    """Copy what says how the weights, or those of the base, are rounded; a further line about it where that cannot be."""
    files = read_side_files(found.path, ROUNDING_FILES) if found.path.is_dir() else {}
    if files and to != "hf":
        return f"\n{rounding_left_out(files, found.path, f'--to {to}')}"
    for name, content in files.items():
        (place / name).write_bytes(content)
    return ""


def _convert_prefix(found: Found, output: Path, to: str, base: _Base, dtype: torch.dtype | None, tp: int) -> str:
    """Positions behind a prefix count otherwise in PaddleNLP, so its keys are rotated: equal up to rounding."""
    model = base.needed(None, found) if found.format == "paddle" else base.given()
    config, state = _read_prefix(found.format, found.path, model)
    state = _cast(state, dtype)
    if base.name is not None:
        config = replace(config, base_model_name_or_path=base.name)
    with staged_output(output, is_file=False) as place:
        if to == "hf":
            peft_prefix.save_prefix(place, state, config, lambda parameters: flatten(parameters, config.num_layers))
        else:
            model = model or base.needed(config.base_model_name_or_path, found)
            write_paddle_prefix(place, config, state, model, tp=tp)
        kept = _keep_rounding(found, to, place)
        _, written = _read_prefix(to, place, model)
        if written.keys() != state.keys():  # PaddleNLP's network would be another one
            return f"{config.num_virtual_tokens} tokens; written as the keys and values that its network makes{kept}"
        largest = 0.0
        for name, tensor in state.items():
            difference = relative_difference(tensor, written[name])
            if not difference <= _ROTATED * torch.finfo(tensor.dtype).eps:
                raise FormatError(
                    f"{place}: {name} differs from the original by {difference:.1e}: do not use this prefix"
                )
            largest = max(largest, difference)
    return f"{config.num_virtual_tokens} tokens; all {len(state)} tensors equal to {largest:.0e} of their norm{kept}"
