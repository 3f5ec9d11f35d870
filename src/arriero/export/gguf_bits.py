"""In how many bits a GGUF file stores the matrices of a model's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import median_low

from arriero.formats.gguf.file import GGUFFile
from arriero.formats.gguf.names import hf_name
from arriero.formats.source import ModelSource

_BITS = re.compile(r"I?Q([1-8])_\w+")  # of ggml's names of types
_PLAIN = 16  # or more


def layer_bits(source: ModelSource) -> dict[str, int]:
    """Of each matrix of a layer, by its name in an HF folder; nothing of a model of another format.

    Raises:
        FormatError: when the file cannot be read any more.
    """
    if source.format != "gguf":
        return {}
    with GGUFFile(source.path) as file:
        matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) == 2]
    found = {hf_name(tensor.name): _BITS.fullmatch(tensor.type_name) for tensor in matrices}
    return {
        name: _PLAIN if match is None else int(match[1])
        for name, match in found.items()
        if name.startswith("model.layers.")
    }


def usual_bits(bits: Mapping[str, int]) -> int | None:
    """4 or 8, which hold most of the matrices; None where most are floating-point numbers, or there are none."""
    usual = median_low(bits.values()) if bits else _PLAIN
    return None if usual >= _PLAIN else 4 if usual <= 4 else 8
