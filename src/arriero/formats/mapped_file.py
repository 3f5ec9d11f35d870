"""Files mapped into memory, whatever their size, and tensors that are views of them."""

from __future__ import annotations

import mmap
import sys
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named from Python 3.13 on


class MappedFile:
    """A file mapped copy-on-write: what is read of it takes no memory of its own until it is written to, and nothing that is
    written to a view reaches the file.

    Memory for such copies is not reserved (torch and the safetensors library reserve it), so that the file may be larger than
    the memory. It stays mapped as long as there is a view.

    Raises:
        OSError: when it cannot be opened.
        ValueError: when it is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE)

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor that begins at a byte of the file, on the CPU.

        Raises:
            ValueError: when it ends behind the file.
        """
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        # Through NumPy, which keeps the file mapped under the tensor; torch.frombuffer alone does not.
        content = np.frombuffer(self._content, np.uint8, count * dtype.itemsize, start)
        return torch.from_numpy(content).view(dtype).view(shape)
