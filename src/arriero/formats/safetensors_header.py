"""The header of a safetensors file: where each tensor lies (https://github.com/huggingface/safetensors, "Format")."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from arriero.errors import FormatError

# In the library's order: it writes wide numbers first, so that each tensor is aligned to its own.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}
_ALIGNMENT = 8


def name_of_dtype(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "BF16".

    Raises:
        FormatError: for a dtype that these files do not hold.
    """
    if dtype not in _NAMES:
        raise FormatError(f"safetensors files hold no {str(dtype).removeprefix('torch.')} tensors")
    return _NAMES[dtype]


def dtype_of_name(name: str) -> torch.dtype:
    """ "BF16" -> `torch.bfloat16`.

    Raises:
        FormatError: for a name that is none.
    """
    if name not in _DTYPES:
        raise FormatError(f"the safetensors dtype {name[:20]!r} is not supported")
    return _DTYPES[name]


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a file that holds these tensors, byte for byte as the safetensors library writes it.

    Args:
        tensors: dtype and shape by name.
        metadata: {"format": "pt"} if not given; with several keys the library's own order is arbitrary.

    Returns:
        The header with its length before it, where each tensor begins in the file, and the size of the file; in bytes.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (_ORDER.get(tensors[name][0], 0), name)):
        dtype, shape = tensors[name]
        starts[name], end = end, end + prod(shape) * dtype.itemsize
        content[name] = {"dtype": name_of_dtype(dtype), "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def read_entries(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """What the header of a file says of its tensors; the safetensors library must have checked it (`safe_open` does).

    Returns:
        By name: dtype, shape, and where it begins and ends in the file, in bytes.

    Raises:
        FormatError: two tensors have one name: the library takes the last, others may take the first.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise FormatError(f"{path}: its header names {name[:80]!r} twice; do not trust this file")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length), object_pairs_hook=distinct)
    entries.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (entry["dtype"], tuple(entry["shape"]), *(start + int(at) for at in entry["data_offsets"]))
        for name, entry in entries.items()
    }
