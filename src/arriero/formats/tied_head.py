"""Output heads that a file holds beside an embedding which config.json calls tied: copies of it, or heads of their own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.safe_tensors import weight_files
from arriero.formats.shared_files import PartReader
from arriero.formats.tensor_shards import is_sharded
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import HEAD

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
OWN_HEAD = (
    f"tie_word_embeddings is set, but {HEAD} differs from the embedding: the model keeps its own head and is not tied"
)
_BLOCK = 2**24  # numbers that are compared at a time


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in every bit, dtype and shape included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.dim():
        return torch.equal(_bytes(one), _bytes(other))
    step = max(1, _BLOCK * len(one) // max(1, one.numel()))
    blocks = zip(torch.split(one, step), torch.split(other, step), strict=True)
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in blocks)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_config(folder: str | Path) -> LlamaConfig:
    """The configuration of an HF folder as its weights have it; see `untied`.

    Raises:
        FormatError: as `LlamaConfig.from_file`.
    """
    return untied(LlamaConfig.from_file(folder), folder)


def untied(config: LlamaConfig, folder: str | Path) -> LlamaConfig:
    """A configuration that calls the head tied, without that where the folder's weights have another head, as transformers 5
    takes it; a warning says so. Only where both are stored they are compared, once a process.
    """
    folder = Path(folder)
    if not config.tie_word_embeddings or not folder.is_dir() or is_sharded(folder):
        return config
    try:
        states = [(path, path.stat()) for path in weight_files(folder)]
        own = _has_own_head(tuple((str(path), state.st_mtime_ns, state.st_size) for path, state in states))
    except (FormatError, OSError):  # there are no weights, or who reads them says what is wrong
        return config
    return replace(config, tie_word_embeddings=False) if own else config


def state_untied(config: LlamaConfig, state: Mapping[str, Tensor]) -> LlamaConfig:
    """As `untied`, of weights that are open already; without a warning."""
    head, embedding = state.get(HEAD), state.get(EMBEDDING)
    if not config.tie_word_embeddings or head is None or embedding is None or same_bits(head, embedding):
        return config
    return replace(config, tie_word_embeddings=False)


@functools.lru_cache(16)
def _has_own_head(files: tuple[tuple[str, int, int], ...]) -> bool:
    """Whether these weight files hold both, and they differ.

    Args:
        files: path, time and size of each, by which files that were replaced are found out.
    """
    places: dict[str, PartReader] = {}
    for path, *_ in files:
        reader = PartReader(path)
        places |= {name: reader for name in (HEAD, EMBEDDING) if name in reader}
    if len(places) < 2 or same_bits(places[HEAD].read(HEAD), places[EMBEDDING].read(EMBEDDING)):
        return False
    logger.warning("%s: %s", Path(files[0][0]).parent, OWN_HEAD)
    return True
