"""Prefixes in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

The one tensor, `prompt_embeddings`, is (P, layers * 2 * width) with width = key-value heads * head size: for each prefix
token the key and the value of the first layer, then those of the second, and so on. It is what a network made, if one did;
the network's own parameters, which PEFT does not keep, lie beside it in `prefix_encoder.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.parts import Part, Placement
from arriero.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from arriero.formats.shared_files import ALONE, PartReader, Peers, shared_folder, write_tensor_file

ENCODER_WEIGHTS = "prefix_encoder.safetensors"
EMBEDDINGS = "prompt_embeddings"


@dataclass(frozen=True)
class PeftPrefixConfig:
    """The part of PEFT's `PrefixTuningConfig` that decides what a prefix is.

    Attributes:
        num_virtual_tokens: P.
        token_dim: width of one key or value, all heads together.
        num_attention_heads: key-value heads, where queries share them.
        num_layers: of the model.
        prefix_projection: made by a network.
        encoder_hidden_size: that network's width.
        base_model_name_or_path: the model it was trained on.
        extra: every other key of the file, written back.
    """

    num_virtual_tokens: int
    token_dim: int
    num_attention_heads: int
    num_layers: int
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    base_model_name_or_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = ADAPTER_CONFIG) -> PeftPrefixConfig:
        """Read the content of an adapter_config.json.

        Raises:
            FormatError: for a missing or impossible value, or a method that is not prefix tuning, naming the key.
        """
        kind = values.get("peft_type")
        if kind != "PREFIX_TUNING":
            hint = "; it goes with --lora_path" if kind == "LORA" else ""
            raise FormatError(f"{source}: peft_type {str(kind)[:40]!r} is not a prefix ('PREFIX_TUNING'){hint}")
        numbers = {}
        for key in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            numbers[key] = _count(values.get(key), key, source)
        if numbers["token_dim"] % numbers["num_attention_heads"]:
            raise FormatError(
                f"{source}: token_dim {numbers['token_dim']} is no multiple of "
                f"num_attention_heads {numbers['num_attention_heads']}"
            )
        if values.get("num_transformer_submodules", 1) not in (1, None):
            raise FormatError(f"{source}: num_transformer_submodules must be 1: only decoders are supported")
        projection, size = values.get("prefix_projection", False), values.get("encoder_hidden_size")
        if not isinstance(projection, bool):
            raise FormatError(f"{source}: prefix_projection must be true or false, got {projection!r}")
        if size is not None:
            _count(size, "encoder_hidden_size", source)
        base = values.get("base_model_name_or_path")
        own = set(cls.__dataclass_fields__) - {"extra"}
        extra = {key: value for key, value in values.items() if key not in own}
        return cls(
            **numbers,
            prefix_projection=projection,
            encoder_hidden_size=size,
            base_model_name_or_path=base if isinstance(base, str) else None,
            extra=extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of an adapter_config.json for PEFT."""
        return {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_transformer_submodules": 1,
            **self.extra,
            "peft_type": "PREFIX_TUNING",
            "base_model_name_or_path": self.base_model_name_or_path,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": self.token_dim,
            "num_attention_heads": self.num_attention_heads,
            "num_layers": self.num_layers,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size,
        }

    @property
    def shape(self) -> tuple[int, int]:
        """Of `prompt_embeddings`."""
        return self.num_virtual_tokens, self.num_layers * 2 * self.token_dim

    def columns(self, layer: int, which: Literal["key", "value"]) -> slice:
        """Where one layer's keys or values lie in `prompt_embeddings`."""
        start = (2 * layer + (which == "value")) * self.token_dim
        return slice(start, start + self.token_dim)


def _count(value: Any, key: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{source}: {key} must be a whole number of at least 1, got {str(value)[:40]}")
    return value


def read_config(folder: str | Path) -> PeftPrefixConfig:
    """The configuration of a prefix folder.

    Raises:
        FormatError: when the file is missing or broken, or of another kind of adapter.
    """
    values, source = read_adapter_config(Path(folder), "a prefix folder needs it")
    return PeftPrefixConfig.from_dict(values, source)


def save_prefix(
    folder: str | Path,
    state: Mapping[str, Part] | Mapping[str, Tensor],
    config: PeftPrefixConfig,
    flatten: Callable[[PartReader], Tensor],
    peers: Peers = ALONE,
) -> None:
    """Write a prefix that PEFT loads, as a whole or not at all.

    Args:
        state: the trained parameters.
        flatten: makes `prompt_embeddings` of them, in one process.
        peers: the processes that hold the parameters together; every one calls this with its own parts.

    Raises:
        FormatError: when it cannot be written.
        PeerError: when it went wrong in another process.
    """
    with shared_folder(folder, peers, replaces=(ENCODER_WEIGHTS,)) as staging:
        parameters = staging / ENCODER_WEIGHTS
        write_tensor_file(state, parameters, peers)
        with peers.together():
            if peers.first:
                embeddings = flatten(PartReader(parameters)).contiguous()
                write_tensor_file({EMBEDDINGS: embeddings}, staging / ADAPTER_WEIGHTS)
                text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
                (staging / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
                if not config.prefix_projection:  # the same numbers once more
                    parameters.unlink()


def open_embeddings(folder: str | Path, config: PeftPrefixConfig) -> PartReader:
    """A reader of `prompt_embeddings`.

    Raises:
        FormatError: when the file is missing or broken, or the tensor is of another shape than the configuration says.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        hint = "; the pickled adapter_model.bin is never opened" if path.with_name("adapter_model.bin").exists() else ""
        raise FormatError(f"{folder}: holds no {ADAPTER_WEIGHTS}{hint}")
    reader = PartReader(path)
    if reader.shapes.get(EMBEDDINGS) != config.shape:
        found = {name: list(shape) for name, shape in list(reader.shapes.items())[:3]}
        raise FormatError(f"{path}: {EMBEDDINGS} {list(config.shape)} is expected, the file holds {found}")
    check_number(path, EMBEDDINGS, reader.dtype(EMBEDDINGS))
    return reader


def open_encoder(folder: str | Path) -> PartReader | None:
    """A reader of the network's parameters; None where they were not kept."""
    path = Path(folder) / ENCODER_WEIGHTS
    return PartReader(path) if path.is_file() else None


def read_layer(
    reader: PartReader, config: PeftPrefixConfig, layer: int, which: Literal["key", "value"], where: Placement
) -> Tensor:
    """A process's part of one layer's keys or values, (P, width) as a whole."""
    rows, columns = where.box
    start = config.columns(layer, which).start
    return reader.read(EMBEDDINGS, (rows, slice(start + columns.start, start + columns.stop)))


def check_number(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raises FormatError for a tensor that holds no floating-point numbers of at least 16 bits."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(f"{path}: {name} has the dtype {str(dtype).removeprefix('torch.')}")
