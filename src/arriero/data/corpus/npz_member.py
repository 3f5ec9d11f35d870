"""One-dimensional integer arrays out of .npy and .npz files that somebody else wrote: never unpickled, counts checked first."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import DataError

# a compressed array is unpacked into memory up to this size; an uncompressed one is mapped and may be of any
MAX_UNPACKED_BYTES = 1 << 30

# a damaged header goes through numpy's parser of literals, which lets these through
_HEADER_ERRORS = (
    *(ValueError, TypeError, EOFError, SyntaxError, RecursionError, MemoryError),
    *(struct.error, tokenize.TokenError),
)


def map_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file, mapped and read-only.

    Raises:
        DataError: unless it holds all numbers that its header promises, integers in one dimension.
    """
    try:
        with path.open("rb") as file:
            dtype, count = _read_header(file, str(path))
            start = file.tell()
        return _map(path, dtype, count, start, str(path), path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_member(path: Path, name: str, most: int | None, *, optional: bool = False) -> NDArray[Any] | None:
    """The array `name` of a .npz file.

    Args:
        most: the most numbers it may hold; None for any: then it is mapped where it is not compressed.
        optional: whether it may be absent; None is returned then.

    Raises:
        DataError: if it is missing, damaged, larger than `most`, or anything but integers in one dimension.
    """
    where = f"{path} ({name})"
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                if optional:
                    return None
                raise DataError(f"{path}: holds no array named {name}: it is not the file of a corpus")
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as file:
                dtype, count = _read_header(file, where)
                start = file.tell()
                if count * dtype.itemsize != member.file_size - start:
                    raise DataError(f"{where}: its header promises {count:,} numbers, it holds others: it is damaged")
                if most is None and member.compress_type == zipfile.ZIP_STORED:
                    return _map(path, dtype, count, _content_start(path, member) + start, where)
                if most is not None and count > most:
                    raise DataError(f"{where}: {count:,} numbers are more than its ids can have: it is damaged")
                if most is None and member.file_size > MAX_UNPACKED_BYTES:
                    raise DataError(
                        f"{where}: {member.file_size:,} bytes when unpacked: too large to read compressed; "
                        "save it with numpy.save and numpy.savez as PREFIX_ids.npy and PREFIX_idx.npz"
                    )
                return np.frombuffer(file.read(count * dtype.itemsize), dtype)
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _content_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: after its local header, whose name and extra field may differ in length."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return member.header_offset + 30 + int(name_length) + int(extra_length)


def _read_header(file: IO[bytes], where: str) -> tuple[np.dtype[Any], int]:
    """Type and count of the numbers that follow (numpy reads at most 10,000 bytes of header, as a literal)."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except _HEADER_ERRORS as error:
        raise DataError(f"{where}: is not an array of numpy ({' '.join(str(error).split())[:120]})") from error
    if dtype.hasobject:
        raise DataError(f"{where}: holds pickled objects, which are not loaded: save plain integers")
    if dtype.kind not in "iu" or len(shape) != 1 or shape[0] < 0:
        raise DataError(f"{where}: holds {dtype} of shape {shape}: integers in one dimension are needed")
    return dtype, shape[0]


def _map(path: Path, dtype: np.dtype[Any], count: int, start: int, where: str, size: int | None = None) -> NDArray[Any]:
    if size is not None and size != start + count * dtype.itemsize:
        raise DataError(
            f"{where}: is {size:,} bytes where {count:,} ids need {start + count * dtype.itemsize:,}: "
            "it is truncated or damaged"
        )
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset=start, shape=(count,)))
