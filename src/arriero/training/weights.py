"""How the trained weights of each method are stored: a whole HF folder, or an adapter in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from arriero.adapters.lora import LoRAConfig
from arriero.adapters.peft_config import to_peft
from arriero.data.tokenizer import Tokenizer
from arriero.data.tokenizer_files import SIDE_FILES
from arriero.errors import FormatError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import BASE_QUANTIZATION, base_quantization_text
from arriero.formats.parts import Part
from arriero.formats.shared_files import PartReader, shared_folder
from arriero.models.llama import LlamaForCausalLM
from arriero.models.vocabulary import EMBEDDING
from arriero.parallel.placement import local_tensors, placements
from arriero.parallel.processes import Processes
from arriero.training.run_facts import check_kind


def keep_base_quantization(folder: Path, kind: str | None, processes: Processes) -> None:
    """Say in an adapter's folder how its base was rounded; nothing of an earlier run stays where it was not.

    To be called before the weights are written: they never stand there without it.
    """
    if kind is None:
        with processes.together():
            if processes.first:
                (folder / BASE_QUANTIZATION).unlink(missing_ok=True)
        return
    with shared_folder(folder, processes) as staging, processes.together():
        if processes.first:
            (staging / BASE_QUANTIZATION).write_text(base_quantization_text(kind), encoding="utf-8")


def model_parts(model: nn.Module) -> dict[str, Part]:
    """What this process holds of every parameter: the weights themselves, not copies."""
    where = placements(model)
    return {name: Part(tensor.detach(), where[name]) for name, tensor in local_tensors(model).items()}


@dataclass
class FullWeights:
    """Every parameter, as an HF folder.

    Attributes:
        source: whose generation defaults and licence files come along.
        tokenizer: whose files do; None for those of `source`.
    """

    model: LlamaForCausalLM
    source: Path
    tokenizer: Tokenizer | None = None
    max_shard_size: str = "5GB"

    def parts(self) -> dict[str, Part]:
        return model_parts(self.model)

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        with processes.together():
            files = self._tokenizer_files() if processes.first else {}
        hf.save_model(
            parts,
            self.model.config,
            folder,
            max_shard_size=self.max_shard_size,
            extra_files_from=self.source,
            extra_files=files,
            peers=processes,
        )

    def _tokenizer_files(self) -> dict[str, bytes]:
        """What does not lie in `source` of the tokenizer's files."""
        if self.tokenizer is None:
            return {}
        files: dict[str, bytes] = {}
        if self.tokenizer.folder != self.source:
            paths = [self.tokenizer.folder / name for name in SIDE_FILES if name != "generation_config.json"]
            files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        return files | dict(self.tokenizer.replaced_files)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        check_kind(folder, None)
        reader = PartReader(folder)
        rows, wanted = reader.shapes.get(EMBEDDING, (0,))[0], self.model.config.vocab_size
        if rows not in (0, wanted):
            raise FormatError(
                f"{folder}: its vocabulary has {rows} rows, that of this run {wanted}: give the same tokens "
                "(--add_tokens, --add_special_tokens, --resize_vocab) and --pad_vocab_to_multiple_of"
            )
        hf.check_state(self.model.config, reader.shapes, str(folder))
        for name, part in self.parts().items():
            stored = part.placement.stored_as or name
            _check_number(folder, stored, reader.dtype(stored))
            part.tensor.copy_(reader.read_part(stored, part.placement))


@dataclass
class AdapterWeights:
    """The LoRA tensors, as PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        base_quantization: how the run rounded the base as it read it, which `base_quantization.json` keeps: "nf4", "int8", or
            None.
    """

    model: nn.Module
    config: LoRAConfig
    base_model: str
    base_quantization: str | None = None

    def parts(self) -> dict[str, Part]:
        trained = {name for name, p in self.model.named_parameters() if ".lora_" in name or p.requires_grad}
        return {name: part for name, part in model_parts(self.model).items() if name in trained}

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        keep_base_quantization(folder, self.base_quantization, processes)
        peft.save_adapter(folder, parts, to_peft(self.config, self.base_model), processes)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        check_kind(folder, "--lora")
        peft.check_config(folder, to_peft(self.config, self.base_model))
        own = self.parts()
        found = peft.load_adapter_parts(folder, {name: part.placement for name, part in own.items()})
        for name, tensor in found.items():
            _check_number(folder, name, tensor.dtype)
            own[name].tensor.copy_(tensor)


def _check_number(folder: Path, name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(f"{folder}: {name} is {str(dtype).removeprefix('torch.')}, a floating-point tensor is needed")
