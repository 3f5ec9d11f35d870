"""How a run with quantization-aware training is stored: the exact weights as ever, and beside them what rounds them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from arriero.errors import FormatError
from arriero.formats.parts import Part
from arriero.formats.shared_files import PartReader, shared_folder, write_tensor_file
from arriero.parallel.processes import Processes
from arriero.quantization.qat import RANGES_FILE, SETTINGS_FILE, QatSettings, is_range, read_settings
from arriero.training.checkpoint import WeightStore
from arriero.training.weights import AdapterWeights, FullWeights, model_parts


class ExactWeights(FullWeights):
    """Every parameter but the ranges of the inputs."""

    def parts(self) -> dict[str, Part]:
        return {name: part for name, part in super().parts().items() if not is_range(name)}


class ExactAdapterWeights(AdapterWeights):
    """An adapter without the ranges of the inputs."""

    def parts(self) -> dict[str, Part]:
        return {name: part for name, part in super().parts().items() if not is_range(name)}


@dataclass
class QatWeights:
    """Weights that are rounded in training.

    Attributes:
        exact: how they are stored themselves.
    """

    model: nn.Module
    exact: WeightStore
    settings: QatSettings

    def _ranges(self) -> dict[str, Part]:
        return {name: part for name, part in model_parts(self.model).items() if is_range(name)}

    def parts(self) -> dict[str, Part]:
        return self.exact.parts() | self._ranges()

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        ranges = {name: part for name, part in parts.items() if is_range(name)}
        # first what makes the folder one of rounded weights: never the weights without it
        with shared_folder(folder, processes) as staging:
            if self.settings.rounds_inputs:
                write_tensor_file(ranges, staging / RANGES_FILE, processes)
            with processes.together():
                if processes.first:
                    (staging / SETTINGS_FILE).write_text(self.settings.to_json(), encoding="utf-8")
        self.exact.write(folder, {name: part for name, part in parts.items() if name not in ranges}, processes)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        stored = read_settings(folder)
        if stored != self.settings:
            found = f"with {stored}" if stored is not None else "without --qat"
            raise FormatError(f"{folder} was trained {found}; this run is {self.settings}: give the same options")
        self.exact.load(folder)
        ranges = self._ranges()
        if ranges:
            reader = PartReader(folder / RANGES_FILE)
            for name, part in ranges.items():
                part.tensor.copy_(reader.read_part(name, part.placement))


def copy_rounding(source: Path, target: Path, dtype: torch.dtype) -> list[str]:
    """Let another form of the same weights (a merged adapter) say how they are rounded.

    Args:
        source: the folder of the run, or of any other model or adapter.
        dtype: of the weights in `target`.

    Returns:
        A line for the user where integers made of them may not be those that were trained.
    """
    for name in (SETTINGS_FILE, RANGES_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if dtype.itemsize >= 4 or not (source / SETTINGS_FILE).is_file():
        return []
    return [
        f"the merged weights are rounded to {str(dtype).removeprefix('torch.')} before they are rounded as in training: for "
        f"exactly the integers that were trained, arriero convert {source} OUTPUT --to quantized, and not the merged model"
    ]
