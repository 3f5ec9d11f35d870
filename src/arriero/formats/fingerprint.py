"""Which weights a model folder holds, in a few characters, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from arriero.formats import hf
from arriero.formats.parts import Placement
from arriero.formats.quantized import QuantizedFolder
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes


def weights_fingerprint(folder: Path) -> str:
    """Of a row of each tensor of the first and the last layer and outside of the layers, as fp32: the same for copies in other
    folders, in files of another size, and in wider types.

    Raises:
        FormatError: when a file is missing or broken.
    """
    config = LlamaConfig.from_file(folder)
    reader = hf.open_parts(folder, config)
    digest = hashlib.blake2b(digest_size=12)
    read = ("layers.0.", f"layers.{config.num_hidden_layers - 1}.")
    for name, shape in weight_shapes(config).items():
        if ".layers." in name and not any(layer in name for layer in read):
            continue
        if isinstance(reader, QuantizedFolder):
            row = reader.dequantized(name, torch.float32)
            row = row[0] if len(shape) > 1 else row
        else:
            size = (1, *shape[1:]) if len(shape) > 1 else tuple(shape)
            row = reader.read_part(name, Placement(tuple(shape), (0,) * len(shape), size))
        numbers = row.to(torch.float32).contiguous()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()
