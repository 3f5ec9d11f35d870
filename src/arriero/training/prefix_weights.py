"""How a trained prefix is stored: as PEFT's files, with the network that makes it beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from arriero.adapters.prefix import PrefixConfig, is_prefix
from arriero.adapters.prefix_files import flatten, open_prefix, to_peft
from arriero.errors import FormatError
from arriero.formats import peft_prefix
from arriero.formats.parts import Part
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.run_facts import check_kind
from arriero.training.weights import keep_base_quantization, model_parts


@dataclass
class PrefixWeights:
    """The keys and values, as PEFT's `adapter_config.json` and `adapter_model.safetensors`; if a network makes them, its
    parameters too, in `prefix_encoder.safetensors`, from which training goes on."""

    model: LlamaForCausalLM
    config: PrefixConfig
    base_model: str
    base_quantization: str | None = None  # as of `AdapterWeights`

    def parts(self) -> dict[str, Part]:
        return {name: part for name, part in model_parts(self.model).items() if is_prefix(name)}

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        shape = self.model.config
        keep_base_quantization(folder, self.base_quantization, processes)
        peft_prefix.save_prefix(
            folder,
            parts,
            to_peft(self.config, shape, self.base_model),
            lambda parameters: flatten(parameters, shape.num_hidden_layers),
            processes,
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        check_kind(folder, "--prefix_tuning")
        stored = open_prefix(folder, self.model.config, self.base_model, trainable=True)
        found, wanted = self._options(stored.config), self._options(self.config)
        for option in wanted:
            if found.get(option) != wanted[option]:
                raise FormatError(
                    f"{folder}: the prefix was trained with --{option} {found.get(option)}, this run has {wanted[option]}: "
                    "give the same prefix options"
                )
        for name, part in self.parts().items():
            part.tensor.copy_(stored.read(name, part.placement))

    def _options(self, config: PrefixConfig) -> dict[str, int | bool]:
        """What the shapes of the parameters depend on."""
        options: dict[str, int | bool] = {
            "num_prefix_tokens": config.length,
            "prefix_projection": config.projection,
        }
        if config.projection:
            options["prefix_projection_hidden_size"] = config.projection_size or self.model.config.hidden_size
        return options
