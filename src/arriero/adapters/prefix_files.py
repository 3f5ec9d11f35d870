"""Prefixes between the model's parameters and PEFT's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.adapters.prefix import ENCODER, PrefixConfig, is_prefix
from arriero.errors import FormatError
from arriero.formats import peft_prefix
from arriero.formats.parts import Placement
from arriero.formats.peft_prefix import PeftPrefixConfig
from arriero.formats.shared_files import PartReader
from arriero.models.config import LlamaConfig

Which = Literal["key", "value"]
BOTH: tuple[Which, Which] = ("key", "value")


def parameter_name(layer: int, which: Which) -> str:
    """Of a layer's keys or values that are learned directly."""
    return f"model.layers.{layer}.self_attn.prefix.{which}"


def to_peft(config: PrefixConfig, model: LlamaConfig, base_model: str) -> PeftPrefixConfig:
    """Our prefix configuration in PEFT's words."""
    return PeftPrefixConfig(
        num_virtual_tokens=config.length,
        token_dim=model.num_key_value_heads * model.head_dim,
        num_attention_heads=model.num_key_value_heads,
        num_layers=model.num_hidden_layers,
        prefix_projection=config.projection,
        encoder_hidden_size=config.projection_size or model.hidden_size,
        base_model_name_or_path=base_model,
    )


@dataclass(frozen=True)
class StoredPrefix:
    """A prefix folder, open for reading.

    Attributes:
        config: what the folder trains on as: with a projection only if the network's parameters are there.
        read: a process's part of a parameter, by its name in the model.
    """

    config: PrefixConfig
    read: Callable[[str, Placement], Tensor]


def open_prefix(
    folder: str | Path, model: LlamaConfig, base_model: str, *, trainable: bool = False, dropout: float = 0.0
) -> StoredPrefix:
    """Read a prefix written by PEFT or by `peft_prefix.save_prefix`.

    Args:
        base_model: the name of the model that it is to go before.
        trainable: with the network that made it, where that was kept; else as plain keys and values.
        dropout: of the configuration; PEFT's files know none.

    Raises:
        FormatError: when a file is missing or broken, or the prefix is for another model.
    """
    stored = peft_prefix.read_config(folder)
    _check_base(folder, stored, model, base_model)
    reader = peft_prefix.open_encoder(folder) if trainable and stored.prefix_projection else None
    if reader is not None:
        size = reader.shapes.get(f"{ENCODER}.linear.weight", (0,))[0]
        config = PrefixConfig(stored.num_virtual_tokens, projection=True, projection_size=size or None, dropout=dropout)
        return StoredPrefix(config, _checked(reader))
    embeddings = peft_prefix.open_embeddings(folder, stored)
    columns = {parameter_name(layer, which): (layer, which) for layer in range(stored.num_layers) for which in BOTH}

    def read(name: str, where: Placement) -> Tensor:
        return peft_prefix.read_layer(embeddings, stored, *columns[name], where)

    return StoredPrefix(PrefixConfig(stored.num_virtual_tokens, dropout=dropout), read)


def _checked(reader: PartReader) -> Callable[[str, Placement], Tensor]:
    def read(name: str, where: Placement) -> Tensor:
        part = reader.read_part(name, where)
        peft_prefix.check_number(reader.source, name, part.dtype)
        return part

    return read


def _check_base(folder: str | Path, stored: PeftPrefixConfig, model: LlamaConfig, base_model: str) -> None:
    found = (stored.num_layers, stored.num_attention_heads, stored.token_dim // stored.num_attention_heads)
    wanted = (model.num_hidden_layers, model.num_key_value_heads, model.head_dim)
    if found != wanted:
        trained = stored.base_model_name_or_path or "a model that it does not name"
        raise FormatError(
            f"{folder}: the prefix is for {trained} ({_in_words(found)}), and {base_model} has {_in_words(wanted)}: "
            "give the model it was trained on"
        )
    if stored.num_virtual_tokens >= model.max_position_embeddings:
        raise FormatError(
            f"{folder}: a prefix of {stored.num_virtual_tokens} fills the context of {base_model}, "
            f"{model.max_position_embeddings} (max_position_embeddings): give another prefix or model"
        )


def _in_words(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers with {shape[1]} key-value heads of {shape[2]}"


def flatten(parameters: PartReader, layers: int) -> Tensor:
    """PEFT's `prompt_embeddings` (P, layers * 2 * width), fp32, from the stored parameters of a prefix."""
    if f"{ENCODER}.linear.weight" not in parameters:
        return torch.cat(
            [parameters.read(parameter_name(layer, which)) for layer in range(layers) for which in BOTH], dim=1
        )

    def read(name: str) -> Tensor:
        return parameters.read(name)

    front = F.linear(
        read(f"{ENCODER}.embedding.weight"), read(f"{ENCODER}.linear.weight"), read(f"{ENCODER}.linear.bias")
    ).tanh()
    last = [f"{parameter_name(layer, which)}_proj" for layer in range(layers) for which in BOTH]
    return torch.cat([F.linear(front, read(f"{name}.weight"), read(f"{name}.bias")) for name in last], dim=1)


def with_prefix(
    values: Callable[[str, Placement], Tensor], prefix: Callable[[str, Placement], Tensor]
) -> Callable[[str, Placement], Tensor]:
    """The values of a model with a prefix: the base's, and those of the prefix."""
    return lambda name, where: (prefix if is_prefix(name) else values)(name, where)


def whole_state(stored: StoredPrefix, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every parameter of a prefix, for a lone process.

    Args:
        shapes: of the model's prefix parameters.
    """
    return {name: stored.read(name, Placement.whole(shape)) for name, shape in shapes.items()}
