"""Weights in the files of torch.save (`.bin`, `.pt`, `.pth`), read without running them.

Such a file is a zip archive with a pickle, which can run any code when it is loaded. Here it never is: the archive's
directory and the pickle are read as data (`torch_zip.py`, `torch_pickle.py`), everything they claim is checked against the
file's length, and the tensors are views of the mapped file, as torch.load(..., mmap=True) makes them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.torch_pickle import MAX_PICKLE_BYTES, DescribedTensor, read_pickle
from arriero.formats.torch_zip import Record, read_records

# Where training programs put the weights among other things.
NESTED = ("state_dict", "model", "model_state_dict", "module")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class TorchFile:
    """An open file of torch.save; a context manager.

    Attributes:
        tensors: the weights by name, in the file's order: views of the mapped file, copied only where they are written to.
    """

    path: Path
    tensors: Mapping[str, Tensor]

    def close(self) -> None:
        """Let go of the mapped file; it goes when the last of its tensors does."""
        self.tensors = {}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_torch_file(path: str | Path) -> TorchFile:
    """Open the state dict in a file of torch.save, or the one below "state_dict" or "model" in it.

    Raises:
        FormatError: when it is no such file, or claims or contains anything that a state dict of floating-point tensors does
            not need.
    """
    path = Path(path)
    records = read_records(path)
    if "data.pkl" not in records or "constants.pkl" in records:
        kind = "a TorchScript program" if "constants.pkl" in records else "some other zip archive"
        raise FormatError(f"{path}: is {kind}, not weights of torch.save")
    byte_order = _content(path, records["byteorder"]) if "byteorder" in records else b"little"
    if byte_order.strip() != b"little":
        raise FormatError(f"{path}: was written by a big-endian machine, which is not supported")
    described = _state_dict(read_pickle(_content(path, records["data.pkl"]), str(path)), path)
    length = path.stat().st_size
    if sum(prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in described.values()) > 2 * length:
        raise FormatError(f"{path}: its tensors together are more than twice as large as the file, so they overlap")
    for name, tensor in described.items():
        _check(name, tensor, records, path)
    whole = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, length))
    return TorchFile(path, {name: _view(whole, tensor, records) for name, tensor in described.items()})


def _content(path: Path, record: Record) -> bytes:
    if record.size > MAX_PICKLE_BYTES:
        raise FormatError(f"{path}: its pickle has {record.size} bytes, more than any model's ({MAX_PICKLE_BYTES})")
    with path.open("rb") as file:
        file.seek(record.offset)
        content = file.read(record.size)
    if zlib.crc32(content) != record.crc:
        raise FormatError(f"{path}: its pickle does not have the checksum that its directory gives; fetch it again")
    return content


def _state_dict(tree: Any, path: Path) -> dict[str, DescribedTensor]:
    if isinstance(tree, dict) and not any(isinstance(value, DescribedTensor) for value in tree.values()):
        nested = [key for key in NESTED if isinstance(tree.get(key), dict)]
        if len(nested) > 1:
            raise FormatError(f"{path}: has weights under {' and '.join(map(repr, nested))}; keep one state dict")
        tree = tree[nested[0]] if nested else tree
    if not isinstance(tree, dict) or not tree:
        raise FormatError(f"{path}: holds no state dict; keep only the tensors: torch.save(model.state_dict(), ...)")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, DescribedTensor):
            raise FormatError(
                f"{path}: {str(name)[:80]!r} is not a tensor but {type(value).__name__}; "
                "keep only the tensors: torch.save(model.state_dict(), ...)"
            )
    return tree


def _check(name: str, tensor: DescribedTensor, records: Mapping[str, Record], path: Path) -> None:
    storage = tensor.storage
    if storage.dtype not in DTYPES:
        raise FormatError(f"{path}: {name} is {str(storage.dtype)[6:]}; only floating-point weights are read")
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise FormatError(f"{path}: {name} needs the record data/{storage.key[:40]}, which is missing; fetch it again")
    if storage.count * storage.dtype.itemsize != record.size:
        raise FormatError(
            f"{path}: {name} claims {storage.count} numbers of {storage.dtype.itemsize} bytes, "
            f"but its record has {record.size} bytes; fetch it again"
        )
    if record.offset % storage.dtype.itemsize:
        raise FormatError(
            f"{path}: {name} is not aligned, so the file was packed by another program; torch.save it again"
        )
    numbers = prod(tensor.shape)
    if numbers == 0:
        raise FormatError(f"{path}: {name} has the shape {list(tensor.shape)[:8]}, so no numbers; fetch it again")
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= storage.count or numbers > storage.count:
        raise FormatError(f"{path}: {name} reaches beyond its {storage.count} stored numbers; fetch it again")


def _view(whole: torch.UntypedStorage, tensor: DescribedTensor, records: Mapping[str, Record]) -> Tensor:
    record, dtype = records[f"data/{tensor.storage.key}"], tensor.storage.dtype
    storage = whole[record.offset : record.offset + record.size]
    return torch.empty(0, dtype=dtype).set_(storage, tensor.offset, tensor.shape, tensor.stride)
