"""What quantization-aware training rounds, and the file that says so beside the weights of a run.

`qat.json` holds the settings, `qat.safetensors` the ranges of the inputs (`...q_proj.input_range`, (1,) each). The weights
beside them are the exact ones that were trained: other tools read them as a model or adapter like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError, FormatError
from arriero.models.tensor_split import INPUT_RANGE
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.schemes import Activation, IntegerWeights

SETTINGS_FILE, RANGES_FILE = "qat.json", "qat.safetensors"
RANGE = INPUT_RANGE  # the last part of a range's name
KINDS = {"A8W8": (8, True), "W4": (4, False), "A8W4": (4, True)}  # bits of the weights; whether inputs are rounded
RANGE_RULES = ("learned", "moving_average")
DEFAULT_GROUP, LEAST_GROUP = 32, 8  # of 4 bits
_MAX_BYTES = 2**16


def is_range(name: str) -> bool:
    """Whether a parameter is the range of a layer's inputs."""
    return name.rpartition(".")[2] == RANGE


@dataclass(frozen=True)
class QatSettings:
    """How the linear layers of the decoder are rounded in training. Embedding and output head stay exact.

    Attributes:
        kind: "A8W8", "W4" or "A8W4": bits of the weights (W), and of the inputs (A) if they are rounded.
        group_size: inputs of an output channel that share a scale; -1 for all of them.
        ranges: how the ranges of the inputs follow the data: "learned" by gradients, or "moving_average".
    """

    kind: str = "A8W8"
    group_size: int = -1
    ranges: str = "learned"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--qat_type {self.kind} is not one of {', '.join(KINDS)}")
        if self.ranges not in RANGE_RULES:
            raise ConfigError(f"--qat_activation {self.ranges} is not one of {', '.join(RANGE_RULES)}")
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(
                f"--qat_group_size is {self.group_size}: give at least 1, or -1 for a whole output channel"
            )

    @classmethod
    def of(cls, kind: str, group_size: int | None, ranges: str, inputs: Iterable[int]) -> QatSettings:
        """The settings of the command line's words.

        Args:
            group_size: None for -1 with 8 bits, and with 4 for 32, or the greatest power of two that divides all layers'
                inputs, or -1 where that is below 8.
            inputs: those numbers.
        """
        if group_size is None:
            common = math.gcd(DEFAULT_GROUP, *inputs)
            group_size = -1 if KINDS.get(kind, (8, True))[0] == 8 or common < LEAST_GROUP else common
        return cls(kind, group_size, ranges)

    @property
    def weights(self) -> IntegerScheme:
        return IntegerScheme(KINDS[self.kind][0], None if self.group_size == -1 else self.group_size)

    @property
    def rounds_inputs(self) -> bool:
        return KINDS[self.kind][1]

    @property
    def stored(self) -> IntegerWeights:
        """How a converted layer is stored."""
        activation = Activation() if self.rounds_inputs else None
        # as compressed-tensors does: only weights without rounded inputs are packed
        return IntegerWeights(self.weights, activation=activation, packed=activation is None)

    def check_layer(self, name: str, in_features: int, parts: int = 1) -> None:
        """Refuse groups that do not fit a layer.

        Args:
            parts: processes that share out its columns.

        Raises:
            ConfigError: if groups do not divide the inputs of each process.
        """
        size = self.weights.group_size
        if size is not None and in_features % size:
            raise ConfigError(
                f"--qat_group_size {size} does not divide the {in_features} inputs of {name}: give one that does, such as "
                f"{math.gcd(in_features, 128)}"
            )
        self.stored.weight_tensors(1, in_features)  # refuses what cannot be packed
        if size is not None and in_features % (size * parts):
            raise ConfigError(
                f"--qat_group_size {size}: {parts} tensor-parallel processes share out the {in_features} inputs of {name}, "
                f"{in_features / parts:g} each, and would cut a group; lower one of them, or give --qat_group_size -1"
            )

    def __str__(self) -> str:
        groups = "a scale for each output channel" if self.group_size == -1 else f"groups of {self.group_size}"
        inputs = f", inputs of 8 bits, {self.ranges.replace('_', ' ')} ranges" if self.rounds_inputs else ""
        return f"{self.kind}: weights of {self.weights.bits} bits, {groups}{inputs}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_settings(folder: Path) -> QatSettings | None:
    """The settings of a folder of quantization-aware training; None for any other folder.

    Raises:
        FormatError: if its `qat.json` is broken.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            values: Any = json.loads(file.read(_MAX_BYTES))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        kind, size, ranges = values["kind"], values["group_size"], values["ranges"]
        if not (isinstance(kind, str) and isinstance(ranges, str) and type(size) is int):
            raise ValueError("a value of the wrong type")
        return QatSettings(kind, size, ranges)
    except (OSError, ValueError, KeyError, RecursionError, ConfigError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: is not what quantization-aware training writes ({reason})") from error
