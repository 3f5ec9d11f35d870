"""The weights of an ONNX graph in a file of their own, which a runtime maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

# A tensor begins at a multiple of it, so that it is mapped by itself; it is the page size of x86 and the least of ARM.
ALIGNMENT = 4096
_TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
}

_DTYPES = {kind: dtype for dtype, kind in _TYPES.items()}


class DataFile:
    """Writes tensors one after the other, and names the place of each for a graph.

    A context manager: leaving it closes the file.

    Attributes:
        path: of the file.
        initializers: of the graph, with the places of their values.
    """

    def __init__(self, path: Path) -> None:
        self.initializers: list[Any] = []
        self.path = path
        self._file = path.open("xb")
        self._end = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, values: npt.NDArray[Any], shape: Sequence[int] | None = None) -> str:
        """Write a tensor; returns its name.

        Args:
            shape: that the graph sees; default: the array's.

        Raises:
            OSError: when it cannot be written.
        """
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(values).data)
        self._end = start + values.nbytes
        self._note(name, values.dtype, values.shape if shape is None else shape, start, values.nbytes)
        return name

    def again(self, name: str, other: str, shape: Sequence[int]) -> str:
        """Give a tensor that is written a second name and shape; returns the name."""
        known = next(tensor for tensor in self.initializers if tensor.name == other)
        tensor = TensorProto()
        tensor.CopyFrom(known)
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(shape)
        self.initializers.append(tensor)
        return name

    @property
    def names(self) -> set[str]:
        """Of the tensors."""
        return {tensor.name for tensor in self.initializers}

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as the graph sees it, mapped."""
        tensor = next(tensor for tensor in self.initializers if tensor.name == name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = _DTYPES[tensor.data_type]
        return np.memmap(str(self.path), dtype, "r", int(place["offset"]), tuple(tensor.dims))

    def _note(self, name: str, dtype: np.dtype[Any], shape: Sequence[int], start: int, length: int) -> None:
        tensor = TensorProto(name=name, data_type=_TYPES[dtype], data_location=TensorProto.EXTERNAL)
        tensor.dims.extend(shape)
        for key, value in (("location", self.path.name), ("offset", str(start)), ("length", str(length))):
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
        self.initializers.append(tensor)
