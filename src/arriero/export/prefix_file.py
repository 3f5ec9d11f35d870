"""A learned prefix in a bundle: the keys and values that every sequence begins with."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from arriero.errors import FormatError

PREFIX = "prefix.npy"
# (layers, 2, KV, P, D) fp32: keys and values of each layer. No rotary position is applied to the keys.
PrefixArray: TypeAlias = npt.NDArray[np.float32]


def write_prefix(folder: Path, prefix: PrefixArray) -> None:
    """Write it into a bundle's folder.

    Raises:
        OSError: when it cannot be written.
    """
    np.save(folder / PREFIX, np.ascontiguousarray(prefix, np.float32), allow_pickle=False)


def read_prefix(folder: Path, shape: tuple[int, ...]) -> PrefixArray:
    """Read and check it.

    Args:
        shape: that the model and the manifest ask for.

    Raises:
        FormatError: when it is not such an array.
    """
    path = folder / PREFIX
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{path}: cannot be read as an array ({error}); export the model again") from error
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != shape:
        raise FormatError(f"{path}: must hold {shape} numbers in fp32; export the model again")
    return found
