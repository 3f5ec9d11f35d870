"""Reading `.safetensors` files, one or a sharded set with its index.

The safetensors library checks the header (its length, the offsets, their overlap), and the file is mapped, so a tensor read
here is a view of the page cache and takes no memory of its own until it is written to. A model is loaded
from safetensors only; the files of torch.save (`.bin`, `.pt`, `.pth`) are pickles, which `arriero convert` reads as data.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.mapped_file import MappedFile
from arriero.formats.safetensors_header import dtype_of_name, read_entries

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What a newly written set of weights makes obsolete in a folder.
WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
MAX_INDEX_BYTES = 256 * 2**20

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, so that a conversion never holds the whole model.

    Attributes:
        shape: of what `load` returns.
        dtype: of what `load` returns.
        load: makes the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class FileTensor(LazyTensor):
    """A tensor whose bytes lie in a file just as a new one will hold them, so that the kernel can copy them across.

    Attributes:
        path: the file.
        offset: of the first byte.
    """

    path: Path
    offset: int


def parse_size(size: str | int) -> int:
    """Bytes of "5GB" (decimal, as transformers reads it), "5GiB" (binary), "500MB" or a plain number.

    Raises:
        FormatError: for anything else.
    """
    if isinstance(size, int):
        if size < 1:
            raise FormatError(f"the size {size} must be at least 1 byte")
        return size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise FormatError(f"the size {size!r} is not understood; write for example '5GB' or '500MB'")
    number, prefix, binary = match.groups()
    value = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if value < 1:
        raise FormatError(f"the size {size!r} must be at least 1 byte")
    return value


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        FormatError: when there is none, the index is broken, or it names a file that is absent or lies elsewhere.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        pickles = [
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pdparams") for path in sorted(folder.glob(pattern))
        ]
        if pickles:
            raise FormatError(
                f"{folder}: has only pickled weights ({pickles[0]}), and a pickle can run code when it is loaded; "
                f"have them read as data, into safetensors: arriero convert {folder} OUTPUT"
            )
        raise FormatError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; this is not a model folder")
    return [folder / name for name in sorted(set(read_index(index).values()))]


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor name -> file name, every file name checked to be a plain one that exists beside the index.

    Args:
        suffix: that every file name must have.

    Raises:
        FormatError: when it is no index, or names anything else.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise FormatError(f"{path}: is larger than {MAX_INDEX_BYTES} bytes; this is not an index")
        values: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON; fetch it again") from error
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names:
        raise FormatError(f"{path}: has no weight_map; fetch it again")
    for name in set(map(str, names.values())):
        if (
            Path(name).name != name
            or "\\" in name
            or not name.endswith(suffix)
            or len(name.encode("utf-8", "surrogatepass")) > 255
        ):
            raise FormatError(f"{path}: names the file {name[:200]!r}; only plain {suffix} names beside it are allowed")
        if not (path.parent / name).is_file():
            raise FormatError(f"{path}: names the file {name!r}, which is missing; fetch it again")
    return {str(key): str(value) for key, value in names.items()}


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one file, in the file's order; on the CPU each is a view of the mapped file, which may be larger than
    the memory.

    Raises:
        FormatError: when the file is missing, truncated or corrupt in any way.
    """
    path = Path(path)
    entries = checked_entries(path)
    with readable(path):
        mapped = MappedFile(path)
    for name, (kind, shape, start, _) in sorted(entries.items(), key=lambda item: item[1][2:]):
        yield name, mapped.view(start, stored_dtype(path, name, kind), shape).to(device)


def read_shapes(path: str | Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype (None for one that is no floating-point weight) and shape of every tensor of a file, without its data."""
    return {name: (_DTYPES.get(kind), shape) for name, (kind, shape, _, _) in checked_entries(Path(path)).items()}


def checked_entries(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """What `read_entries` gives of a file whose header the library has checked, which maps nothing.

    Raises:
        FormatError: when the file is missing, truncated or corrupt in any way.
    """
    with readable(path):
        if path.stat().st_size == 0:
            raise FormatError(f"{path}: the file is empty; fetch it again")
        with safe_open(path, framework="np"):  # for torch it would reserve memory for all of it
            return read_entries(path)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, as a `FormatError` of one line."""
    try:
        yield
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: is not a valid safetensors file ({reason}); fetch it again") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or ' '.join(str(error).split())[:200]})") from error


def stored_dtype(path: Path, name: str, kind: str) -> torch.dtype:
    """Of a tensor of a file, by the name that its header gives.

    Raises:
        FormatError: if torch has no such dtype.
    """
    try:
        return dtype_of_name(kind)
    except FormatError as error:
        raise FormatError(f"{path}: {name}: {error}") from error
