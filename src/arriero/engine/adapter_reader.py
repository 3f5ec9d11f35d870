"""Adapters from their folders into the form in which requests use them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arriero.adapters.lora import apply_lora, check_adapter
from arriero.adapters.lora_config import LoRAConfig
from arriero.adapters.packed_deltas import LayerDeltas, layer_deltas
from arriero.adapters.peft_config import from_peft
from arriero.adapters.prefix import PrefixKV
from arriero.adapters.prefix_files import BOTH, open_prefix, parameter_name, to_peft
from arriero.errors import ConfigError, FormatError
from arriero.formats import peft
from arriero.formats.adapter_base import read_base_quantization
from arriero.formats.parts import Placement
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.linear import has_quantized_layers
from arriero.quantization.qat import SETTINGS_FILE

logger = logging.getLogger(__name__)

Weights = LayerDeltas | PrefixKV


@dataclass(frozen=True)
class AdapterContents:
    """What a folder holds.

    Attributes:
        kind: "lora" (DoRA and the others too) or "prefix".
        rank: the greatest in any layer; 0 of a prefix.
        prefix_length: places that it takes before a prompt.
        digest: of configuration and weights.
    """

    kind: Literal["lora", "prefix"]
    rank: int
    prefix_length: int
    digest: bytes
    weights: Weights

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        if isinstance(self.weights, PrefixKV):
            return sum(tensor.nbytes for tensor in (*self.weights.keys.values(), *self.weights.values.values()))
        return sum(delta.nbytes for delta in self.weights.values())


class AdapterReader:
    """Reads adapters for one model, which it does not change. Any thread may."""

    def __init__(self, model: LlamaForCausalLM, base_model: str, max_rank: int) -> None:
        """
        Args:
            base_model: the model's name, for messages.
            max_rank: no adapter may have more in any layer.
        """
        embedding = model.model.embed_tokens.weight
        self._model, self._base_model, self._max_rank = model, base_model, max_rank
        self._dtype, self._device = embedding.dtype, embedding.device

    def read(self, folder: Path, known: bytes | None = None) -> AdapterContents:
        """Read an adapter, written by PEFT or by this project.

        Args:
            known: the digest of what was read and checked before: then only this is compared.

        Raises:
            FormatError: files that are missing or broken, of another base model, or other ones than before.
            ConfigError: an adapter that is too large or cannot be applied at request time; it says what can be done.
        """
        values, source = peft.read_adapter_config(folder, "an adapter folder needs it")
        if values.get("peft_type") == "PREFIX_TUNING":
            return self._read_prefix(folder, known)
        self._check_config(folder, from_peft(peft.PeftLoraConfig.from_dict(values, source)))
        stored, state = peft.load_adapter(folder)
        config, digest = from_peft(stored), _digest(folder, stored.to_dict(), state, known)
        rank = self._check_config(folder, config)
        if known is None:
            kind = read_base_quantization(folder)
            if kind is not None and not has_quantized_layers(self._model):
                logger.warning(
                    "%s was trained on a base rounded to %s and answers on one that is not, with other numbers: load the model "
                    "with it (--lora_path) for the same",
                    folder,
                    kind,
                )
            with torch.device("meta"):
                adapted = LlamaForCausalLM(self._model.config)
            apply_lora(adapted, config, fresh=False)
            check_adapter(adapted, state)
        try:
            weights = layer_deltas(self._model, config, state, self._dtype, self._device)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}: load the model with it (--lora_path), or merge it") from error
        for (layer, part), delta in weights.items():
            _check_finite(folder, f"layer {layer} {part}", delta.tensors)
        return AdapterContents("lora", rank, 0, digest, weights)

    def _check_config(self, folder: Path, config: LoRAConfig) -> int:
        """The greatest rank."""
        rank = max(config.rank, *config.rank_pattern.values()) if config.rank_pattern else config.rank
        if rank > self._max_rank:
            raise ConfigError(
                f"{folder}: the adapter's rank is {rank} and max_rank {self._max_rank}: raise it, or merge the adapter "
                "(arriero merge)"
            )
        if (folder / SETTINGS_FILE).is_file():
            raise ConfigError(
                f"{folder}: the adapter was trained with rounded weights ({SETTINGS_FILE}), sums that are rounded once "
                "more: load the model with it (--lora_path)"
            )
        return rank

    def _read_prefix(self, folder: Path, known: bytes | None) -> AdapterContents:
        config = self._model.config
        if self._model.model.prefix_length:
            raise ConfigError(
                f"{folder}: the model has a prefix already: load it without one to choose one at request time"
            )
        stored = open_prefix(folder, config, self._base_model)
        length = stored.config.length
        shape = Placement.whole((length, config.num_key_value_heads * config.head_dim))
        state = {
            parameter_name(layer, which): stored.read(parameter_name(layer, which), shape)
            for layer in range(config.num_hidden_layers)
            for which in BOTH
        }
        digest = _digest(folder, to_peft(stored.config, config, "").to_dict(), state, known)
        keys, values = (
            {
                layer: state[parameter_name(layer, which)]
                .view(length, -1, config.head_dim)
                .transpose(0, 1)
                .to(self._device, self._dtype, copy=True)
                for layer in range(config.num_hidden_layers)
            }
            for which in BOTH
        )
        for layer in keys:
            _check_finite(folder, f"layer {layer}", (keys[layer], values[layer]))
        return AdapterContents("prefix", 0, length, digest, PrefixKV(keys, values))


def _check_finite(folder: Path, place: str, tensors: Sequence[Tensor]) -> None:
    """Raises ConfigError: what is no finite number would spoil other requests' rows too."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ConfigError(f"{folder}: {place} holds numbers that are not finite, or become so: the adapter is broken")


def _digest(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], known: bytes | None) -> bytes:
    """Raises FormatError: it is not the known one."""
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        digest.update(state[name].flatten().view(torch.uint8).numpy().data)
    if known is not None and digest.digest() != known:
        raise FormatError(f"{folder}: holds another adapter than the one that was loaded: load it again")
    return digest.digest()
