"""Reading `.pdparams` files: what `paddle.save` writes, a bare pickle of NumPy arrays.

Nothing of the file is run (`pdparams_pickle`) and no array is read before it is asked for (`stored_array`).
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from arriero.errors import FormatError
from arriero.formats.paddle.pdparams_pickle import PdParamsPickle
from arriero.formats.paddle.stored_array import JoinedBytes, StoredArray, is_shape

# Keys that paddle.save adds: Paddle's own names of the parameters, and how arrays of 1 GiB were sliced for protocol 2.
STRUCTURED_NAMES = "StructuredToParameterName@@"
SLICED_ARRAYS = "UnpackBigParamInfor@@"

MAX_TENSORS = 2**15
MAX_NAME = 512
# Tied weights may be one array under two names; a bomb is one under thousands.
MAX_BYTES_PER_FILE_BYTE = 4

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named from Python 3.13 on


@dataclass(frozen=True)
class PdParams:
    """An open `.pdparams` file. A context manager; tensors that are views of the file stay valid after it.

    Attributes:
        path: the file.
        tree: what was saved: dicts, lists, tuples, str, int, float, bool, None and `StoredArray`.
        tensors: its arrays by name, in the file's order. Names of nested dicts and numbers of lists are joined by dots; a
            tensor saved with its name is found under its place (at the top of the file, where it has none: its name).
            Sliced arrays are whole again.
    """

    path: Path
    tree: Any
    tensors: dict[str, StoredArray]
    content: mmap.mmap

    def __enter__(self) -> PdParams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file, at once or with the last tensor that is a view of it."""
        with contextlib.suppress(BufferError):
            self.content.close()


def read_pdparams(path: str | Path) -> PdParams:
    """Open a file of weights; no array of it is read yet.

    Raises:
        FormatError: naming the file and the first thing in it that is wrong or not to be trusted.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FormatError(f"{path}: is no file; check the path")
        with path.open("rb") as file:
            # Private and writable, so that tensors may be views of it; not reserved, as it may exceed the memory.
            content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE)
    except ValueError as error:
        raise FormatError(f"{path}: the file is empty; fetch it again") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        tree = PdParamsPickle(path, content).run()
        return PdParams(path, tree, _flatten(path, tree, len(content)), content)
    except BaseException:
        with contextlib.suppress(BufferError):
            content.close()
        raise


def _flatten(path: Path, tree: Any, size: int) -> dict[str, StoredArray]:
    tensors: dict[str, StoredArray] = {}
    total = 0
    for name, array in _arrays(path, tree, ""):
        total += array.nbytes
        if name in tensors:
            _fail(path, f"two tensors have the name {name[:80]!r}")
        if len(name) > MAX_NAME:
            _fail(path, f"a tensor's name has {len(name)} characters")
        if len(tensors) >= MAX_TENSORS:
            _fail(path, f"it holds more than {MAX_TENSORS} tensors")
        if total > MAX_BYTES_PER_FILE_BYTE * size:
            _fail(path, "it holds the same array under many names")
        tensors[name] = array
    return tensors


def _arrays(path: Path, value: Any, name: str) -> Iterator[tuple[str, StoredArray]]:
    """The arrays of a tree with their names."""
    match value:
        case StoredArray():
            yield name, value
        case (str() as own_name, StoredArray() as array):
            yield name or str(own_name), array
        case dict():
            for key, child in _joined(path, value).items():
                if key != STRUCTURED_NAMES:
                    yield from _arrays(path, child, f"{name}.{key}" if name else key)
        case list() | tuple():
            for number, child in enumerate(value):
                yield from _arrays(path, child, f"{name}.{number}" if name else str(number))


def _joined(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A dict with its sliced arrays joined, at their end as Paddle itself has them."""
    if SLICED_ARRAYS not in state:
        return state
    plan, result = state[SLICED_ARRAYS], {key: value for key, value in state.items() if key != SLICED_ARRAYS}
    if not isinstance(plan, dict):
        _fail(path, f"{SLICED_ARRAYS} is not a dict")
    for name, entry in plan.items():
        match entry:
            case {"OriginShape": (tuple() | list()) as shape, "slices": list() as keys} if len(entry) == 2 and keys:
                parts = [result.pop(key, None) if isinstance(key, str) else None for key in keys]
            case _:
                _fail(path, f"how {name[:80]!r} was sliced is not known")
        arrays = [part for part in parts if isinstance(part, StoredArray) and len(part.shape) == 1]
        if len(arrays) < len(parts) or len({array.dtype for array in arrays}) > 1:
            _fail(path, f"a slice of {name[:80]!r} is missing or of another type")
        if not is_shape(shape) or prod(shape) != sum(array.shape[0] for array in arrays):
            _fail(path, f"the slices of {name[:80]!r} do not have the numbers that its shape needs")
        if name in result:
            _fail(path, f"{name[:80]!r} is there both whole and sliced")
        payload = JoinedBytes([array.payload for array in arrays])
        result[name] = StoredArray(path, tuple(shape), arrays[0].dtype, payload)
    return result


def _fail(path: Path, what: str) -> NoReturn:
    raise FormatError(f"{path}: not a valid file of Paddle weights: {what}; fetch it again")
