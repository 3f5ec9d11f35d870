"""Memory for keys and values that is taken as sequences grow."""

from __future__ import annotations

import mmap
from math import prod

import numpy as np
import numpy.typing as npt


def untouched_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Zeros that take memory a page at a time, as they are written to.

    NumPy's own ask for huge pages, of which each head of each sequence would take one for its first token.
    """
    memory = mmap.mmap(-1, prod(shape) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
