"""The final files of a corpus, written as streams.

PaddleNLP's pair: PREFIX_ids.npy, all ids end to end, and PREFIX_idx.npz with `lens` (int32, tokens of each sentence) and
`docs` (int64, from 0, sentences up to each document's end). Megatron's pair: the ids in PREFIX.bin, and PREFIX.idx as
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py reads it.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {np.dtype("<i4"): 4, np.dtype("<u2"): 8}
# What numpy writes for an array of one dimension, with room for any length.
NPY_HEADER_BYTES = 128
_CHUNK = 2**18


def ids_name(data_impl: str, prefix: str) -> str:
    """The file of the ids."""
    return f"{prefix}_ids.npy" if data_impl == "npy" else f"{prefix}.bin"


def index_name(data_impl: str, prefix: str) -> str:
    """The file of the lengths."""
    return f"{prefix}_idx.npz" if data_impl == "npy" else f"{prefix}.idx"


def meta_name(prefix: str) -> str:
    """The file that tells where a corpus comes from."""
    return f"{prefix}_meta.json"


def reserved_bytes(data_impl: str) -> int:
    """What the file of the ids holds before the ids."""
    return NPY_HEADER_BYTES if data_impl == "npy" else 0


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """The beginning of a .npy file of one dimension (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )
    return header.getvalue()


def complete_ids(path: Path, data_impl: str, dtype: np.dtype[Any], length: int) -> None:
    """Fill in what was left free at the beginning of the ids, now that their number is known."""
    if data_impl != "npy":
        return
    header = npy_header(dtype, length)
    assert len(header) == NPY_HEADER_BYTES
    with path.open("r+b") as file:
        file.write(header)


def write_index(path: Path, data_impl: str, dtype: np.dtype[Any], lens: Path, counts: Path) -> None:
    """Write the index.

    Args:
        dtype: type of the ids.
        lens: raw int32 file, tokens of each sentence.
        counts: raw int32 file, sentences of each document.
    """
    sentences, documents = os.path.getsize(lens) // 4, os.path.getsize(counts) // 4
    if data_impl == "npy":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("lens.npy", "w", force_zip64=True) as file:
                file.write(npy_header(np.dtype("<i4"), sentences))
                _copy(_chunks(lens), file)
            with archive.open("docs.npy", "w", force_zip64=True) as file:
                file.write(npy_header(np.dtype("<i8"), documents + 1))
                _copy(_running_sums(counts, 1), file)
        return
    with path.open("wb") as index:
        index.write(MEGATRON_MAGIC + struct.pack("<QBQQ", 1, MEGATRON_DTYPES[dtype], sentences, documents + 1))
        _copy(_chunks(lens), index)
        _copy(_running_sums(lens, dtype.itemsize, last=False), index)
        _copy(_running_sums(counts, 1), index)


def _copy(chunks: Iterator[npt.NDArray[Any]], file: IO[bytes]) -> None:
    for chunk in chunks:
        file.write(chunk.tobytes())


def _chunks(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    with path.open("rb") as file:
        while content := file.read(_CHUNK * 4):
            yield np.frombuffer(content, "<i4")


def _running_sums(path: Path, scale: int, last: bool = True) -> Iterator[npt.NDArray[np.int64]]:
    """The sum of what stands before each number of a file, times `scale`, as int64; `last`: and that of all of them."""
    total = 0
    for chunk in _chunks(path):
        sizes = chunk.astype("<i8") * scale
        ends = total + np.cumsum(sizes)
        yield ends - sizes
        total = int(ends[-1])
    if last:
        yield np.array([total], "<i8")
