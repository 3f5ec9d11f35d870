"""How the trained weights of each method are stored: a whole HF folder, or an adapter in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arriero.adapters.lora import LoRAConfig, adapter_state, load_adapter_state
from arriero.adapters.peft_config import to_peft
from arriero.data.tokenizer_files import SIDE_FILES
from arriero.errors import FormatError
from arriero.formats import hf, peft
from arriero.models.llama import LlamaForCausalLM


@dataclass
class FullWeights:
    """Every parameter, as an HF folder.

    Attributes:
        source: whose generation defaults and licence files come along.
        tokenizer: the folder whose tokenizer files do; None for that of `source`.
    """

    model: LlamaForCausalLM
    source: Path
    tokenizer: Path | None = None
    max_shard_size: str = "5GB"

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        other = self.tokenizer if self.tokenizer is not None and self.tokenizer != self.source else None
        names = [name for name in SIDE_FILES if name != "generation_config.json"] if other is not None else []
        hf.save_model(
            tensors,
            self.model.config,
            folder,
            max_shard_size=self.max_shard_size,
            extra_files_from=self.source,
            extra_files={name: (other / name).read_bytes() for name in names if other and (other / name).is_file()},
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        own = dict(self.model.named_parameters())
        seen = set()
        for name, tensor in hf.load_state(folder):
            if name not in own or own[name].shape != tensor.shape:
                raise FormatError(f"{folder}: tensor {name} {tuple(tensor.shape)} does not fit this model")
            own[name].copy_(tensor)
            seen.add(name)
        for name in own.keys() - seen:
            raise FormatError(f"{folder}: tensor {name} is missing")


@dataclass
class AdapterWeights:
    """The LoRA tensors, as PEFT's `adapter_config.json` and `adapter_model.safetensors`."""

    model: nn.Module
    config: LoRAConfig
    base_model: str

    def tensors(self) -> dict[str, Tensor]:
        return adapter_state(self.model)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        peft.save_adapter(folder, tensors, to_peft(self.config, self.base_model))

    def load(self, folder: Path) -> None:
        _, state = peft.load_adapter(folder)
        load_adapter_state(self.model, state)
