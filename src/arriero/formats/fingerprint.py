"""Which weights a model folder holds, in a few characters, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from arriero.formats import hf
from arriero.formats.parts import Placement
from arriero.formats.quantized import QuantizedFolder
from arriero.formats.safe_tensors import weight_files
from arriero.formats.safetensors_header import read_entries
from arriero.formats.tensor_shards import is_sharded
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

WHOLE_BYTES = 8 * 2**20  # a file of so many is read from end to end
SAMPLE_BYTES = 1024
SAMPLES = 4  # of each tensor in a larger one


def model_files(folder: Path) -> dict[str, str]:
    """What the files of a model are known by: config.json by what it says, those of weights by `file_fingerprint`.

    Raises:
        FormatError: when one is missing or broken.
    """
    config = json.dumps(LlamaConfig.from_file(folder).to_dict(), sort_keys=True, default=str).encode()
    files = sorted(folder.glob("*.safetensors")) if is_sharded(folder) else weight_files(folder)
    known = {"config.json": hashlib.blake2b(config, digest_size=6).hexdigest()}
    return known | {path.name: file_fingerprint(path) for path in files}


def file_fingerprint(path: Path) -> str:
    """Of a safetensors file: its size, its header, and some bytes of each tensor, at fixed places; of a small one all bytes."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=6)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for start, end in sorted(entry[2:] for entry in read_entries(path).values()):
            for place in _places(start, end):
                file.seek(place)
                digest.update(file.read(min(SAMPLE_BYTES, end - place)))
    return digest.hexdigest()


def _places(start: int, end: int) -> Iterator[int]:
    """Where the samples of a tensor begin: the first at its beginning, the last so that it ends with it."""
    last = max(end - SAMPLE_BYTES, start)
    for number in range(SAMPLES):
        yield start + (last - start) * number // (SAMPLES - 1)


def weights_fingerprint(folder: Path) -> str:
    """Of a row of each tensor of the first and the last layer and outside of the layers, as fp32: the same for copies in other
    folders, in files of another size, and in wider types.

    Raises:
        FormatError: when a file is missing or broken.
    """
    config = read_config(folder)
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
