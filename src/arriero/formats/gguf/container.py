"""Writing a GGUF file: header first, then one tensor after the other.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.errors import FormatError, require
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.file_chunks import write_at
from arriero.formats.gguf import k_quants
from arriero.formats.gguf.file import DEFAULT_ALIGNMENT, MAGIC
from arriero.formats.gguf.tensor_types import BF16, F16, F32, PLAIN, Q4_K, Q5_K, Q6_K, TensorType
from arriero.formats.narrowing import narrowed
from arriero.formats.rearranged import in_order
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.staging import staged_file

# A metadata value. Its Python type decides how it is stored: bool, uint32, float32, string; in arrays int32, float32, string.
Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TORCH_TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_PACKERS: dict[TensorType, Callable[[NDArray[np.float32]], NDArray[np.uint8]]] = {
    Q4_K: k_quants.pack_q4_k,
    Q5_K: k_quants.pack_q5_k,
    Q6_K: k_quants.pack_q6_k,
}
_LARGEST_HALF = 65504.0
_QUANTIZED_CHUNK = 2**16  # numbers that are quantised at once: the intermediate results stay in a processor's cache


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a new file.

    Attributes:
        name: its GGUF name.
        shape: in PyTorch's order.
        type: what it is stored as.
        value: floating-point, of any dtype.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    value: Tensor | LazyTensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.nbytes


def write_container(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorToWrite],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file, whole or not at all; one tensor is in memory at a time.

    Args:
        progress: told (bytes written, bytes in all) after each tensor.

    Raises:
        FormatError: when it cannot be written, or a value fits no number format of the file.
    """
    header = _header(metadata, tensors, path)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with (
        staged_file(path) as place,
        place.open("wb", buffering=0) as file,
        ChunkWriter(total) as writer,
        writer.filling(),
    ):
        descriptor = file.fileno()
        write_at(descriptor, memoryview(header), 0)
        at = len(header)
        for tensor in tensors:
            name = f"{path}: {tensor.name}"
            kind = _TORCH_TYPES.get(tensor.type)
            plain = kind is not None and (kind != torch.float16 or tensor.value.dtype == torch.float16)
            packing = None if plain else partial(pack, kind=tensor.type, name=name)
            writer.put(descriptor, at, name, tensor.value, tensor.nbytes, dtype=kind, pack=packing)
            padding = _padding(tensor.nbytes)
            write_at(descriptor, memoryview(padding), at + tensor.nbytes)
            at += tensor.nbytes + len(padding)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)


def pack(tensor: Tensor, kind: TensorType, name: str) -> NDArray[np.uint8]:
    """The bytes of a tensor, or of some of its rows, in a ggml type.

    Args:
        tensor: (..., columns), floating-point, of any strides; the type's block divides the columns.
        name: of the file and the tensor, for messages.

    Returns:
        (rows, bytes of a row).

    Raises:
        FormatError: for a value that the type cannot hold.
    """
    ordered = in_order(tensor)
    rows = ordered.reshape(-1, ordered.shape[-1])
    step = rows.shape[0] if kind in PLAIN else max(1, _QUANTIZED_CHUNK // rows.shape[1])
    made = np.empty((rows.shape[0], rows.shape[1] // kind.block * kind.nbytes), np.uint8)
    for start in range(0, rows.shape[0], max(1, step)):
        made[start : start + step] = _packed(rows[start : start + step], kind, name)
    return made


def _packed(rows: Tensor, kind: TensorType, name: str) -> NDArray[np.uint8]:
    if kind in PLAIN:
        if kind == F16 and rows.dtype != torch.float16 and (rows.isfinite() & (rows.abs() > _LARGEST_HALF)).any():
            raise FormatError(f"{name} has values beyond {_LARGEST_HALF:g}, the largest of f16; write f32 or bf16")
        plain: NDArray[np.uint8] = narrowed(rows, _TORCH_TYPES[kind], name).contiguous().view(torch.uint8).numpy()
        return plain
    values = rows.to(torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise FormatError(f"{name} has values that are infinite or no numbers, which {kind.name} cannot hold")
    packer = _PACKERS.get(kind)
    with np.errstate(all="ignore"):
        if packer is not None:
            return packer(values)
        quants, constants = require("gguf.quants", "gguf"), require("gguf.constants", "gguf")
        # as one long row, which gguf quantises at once, and not 16 rows at a time
        packed: NDArray[np.uint8] = quants.quantize(values.reshape(1, -1), constants.GGMLQuantizationType(kind.number))
        return packed.reshape(len(values), -1)


def _padding(length: int) -> bytes:
    return b"\0" * (-length % DEFAULT_ALIGNMENT)


def _header(metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite], path: Path) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    try:
        for key, value in metadata.items():
            parts += [_text(key), *_typed(value)]
    except (struct.error, UnicodeEncodeError, OverflowError) as error:
        raise FormatError(f"{path}: {key} cannot be stored in a GGUF file ({error})") from error
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts.append(_text(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.type.number, offset))
        offset += tensor.nbytes + len(_padding(tensor.nbytes))
    header = b"".join(parts)
    return header + _padding(len(header))


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> Iterable[bytes]:
    """The number of a value's type, and the value."""
    if isinstance(value, bool):
        return (struct.pack("<IB", _BOOL, value),)
    if isinstance(value, int):
        return (struct.pack("<II", _UINT32, value),)
    if isinstance(value, float):
        return (struct.pack("<If", _FLOAT32, value),)
    if isinstance(value, str):
        return (struct.pack("<I", _STRING), _text(value))
    count = len(value)
    if all(isinstance(item, str) for item in value):
        return (struct.pack("<IIQ", _ARRAY, _STRING, count), *(_text(str(item)) for item in value))
    if all(isinstance(item, int) for item in value):
        return (struct.pack(f"<IIQ{count}i", _ARRAY, _INT32, count, *value),)
    return (struct.pack(f"<IIQ{count}f", _ARRAY, _FLOAT32, count, *value),)
