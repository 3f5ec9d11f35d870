"""The GGUF container: a header reader that trusts nothing, and tensors dequantised to fp32.

GGUF files come from strangers and their counts, sizes and offsets have been a source of memory corruption elsewhere
(CVE-2024-21802, CVE-2025-53630), so every number here is checked against the length of the file before it is used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import FormatError, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Caps far above any real file and far below what would hurt. ggml itself allows 4 dimensions and 64-byte tensor names.
MAX_METADATA_ENTRIES = 65_536
MAX_TENSORS = 262_144
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 16 * 2**20
MAX_TENSOR_NAME_BYTES = 512
MAX_ARRAY_LENGTH = 2**24
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
_CHUNK = 2**18  # numbers that are dequantised at once

_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF value type -> little-endian struct format.
_SCALARS: dict[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file.

    Attributes:
        name: its GGUF name, e.g. ``blk.0.attn_q.weight``.
        shape: in PyTorch's order (slowest first), the reverse of what the file holds.
        type: the number of its ggml type.
        type_name: the name of its ggml type, e.g. ``Q4_1``.
        offset: in bytes, from the start of the file.
        nbytes: bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    type_name: str
    offset: int
    nbytes: int


class GGUFFile:
    """One GGUF file, memory-mapped read-only.

    Attributes:
        metadata: every key with its value: int, float, bool, str, or a list of these.
        tensors: every tensor's place by name, in file order.

    Raises:
        FormatError: naming the file and the first thing in it that is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        constants = require("gguf.constants", "gguf")
        self._sizes: dict[int, tuple[int, int]] = {int(k): v for k, v in constants.GGML_QUANT_SIZES.items()}
        self._type_names: dict[int, str] = {int(k): k.name for k in constants.GGML_QUANT_SIZES}
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise FormatError(f"{self.path}: the file is empty; fetch it again") from error
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be read ({error.strerror}); check the path") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read_header()
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Arrays from `dequantize` are copies and stay valid."""
        # The traceback of a failed `dequantize` may still hold a view; the map then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """One tensor in fp32, in PyTorch's order of dimensions.

        Raises:
            FormatError: when its type has no dequantiser, e.g. an integer type.
        """
        tensor = self.tensors[name]
        quants, constants = require("gguf.quants", "gguf"), require("gguf.constants", "gguf")
        raw = np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        block, size = self._sizes[tensor.type]
        result = np.empty(math.prod(tensor.shape), dtype=np.float32)
        step = _CHUNK // block
        try:
            for start in range(0, result.size // block, step):
                # as one long row, which gguf dequantises at once, and not 16 rows at a time
                piece = raw[start * size : (start + step) * size].reshape(1, -1)
                with np.errstate(all="ignore"):  # a scale of infinity is the file's, and shows in the weights
                    values = quants.dequantize(piece, constants.GGMLQuantizationType(tensor.type))
                result[start * block : (start + step) * block] = values.reshape(-1)
        except NotImplementedError as error:
            raise FormatError(
                f"{self.path}: tensor {name} has type {tensor.type_name}, which cannot be dequantised; "
                "use a file with another quantisation"
            ) from error
        return result.reshape(tensor.shape)

    # Header

    def _fail(self, what: str, at: int) -> FormatError:
        return FormatError(f"{self.path}: not a valid GGUF file: {what} (at byte {at}); fetch it again")

    def _take(self, at: int, count: int) -> int:
        """The position after `count` bytes from `at`, all of which must lie in the file."""
        if count > len(self._map) - at:
            raise self._fail(f"the file ends after {len(self._map)} bytes, {count} more were announced", at)
        return at + count

    def _number(self, at: int, kind: str) -> tuple[int, int]:
        end = self._take(at, struct.calcsize(kind))
        return int(struct.unpack_from(kind, self._map, at)[0]), end

    def _string(self, at: int, limit: int) -> tuple[str, int]:
        length, start = self._number(at, "<Q")
        if length > limit:
            raise self._fail(f"a string of {length} bytes, at most {limit} are allowed", at)
        end = self._take(start, length)
        try:
            return self._map[start:end].decode("utf-8"), end
        except UnicodeDecodeError as error:
            raise self._fail("a string that is not UTF-8", at) from error

    def _read_header(self) -> None:
        if self._map[:4] != MAGIC:
            raise FormatError(f"{self.path}: not a GGUF file (it does not start with 'GGUF')")
        version, at = self._number(4, "<I")
        if version not in SUPPORTED_VERSIONS:
            hint = "big-endian files are not supported" if version & 0xFFFF == 0 else "versions 2 and 3 are supported"
            raise FormatError(f"{self.path}: GGUF version {version} is not supported ({hint})")
        tensor_count, at = self._number(at, "<Q")
        entry_count, at = self._number(at, "<Q")
        if tensor_count > MAX_TENSORS:
            raise self._fail(f"{tensor_count} tensors announced, at most {MAX_TENSORS} are allowed", 8)
        if entry_count > MAX_METADATA_ENTRIES:
            raise self._fail(
                f"{entry_count} metadata entries announced, at most {MAX_METADATA_ENTRIES} are allowed", 16
            )
        for _ in range(entry_count):
            at = self._read_entry(at)
        places: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensor_count):
            place, at = self._read_place(at)
            places.append(place)
        self._place_tensors(places, at)

    def _read_entry(self, at: int) -> int:
        start = at
        key, at = self._string(at, MAX_KEY_BYTES)
        if key in self.metadata:
            raise self._fail(f"metadata key {key[:80]!r} appears twice", start)
        kind, at = self._number(at, "<I")
        if kind == _ARRAY:
            self.metadata[key], at = self._read_array(key, at)
        else:
            self.metadata[key], at = self._read_value(key, kind, at)
        return at

    def _read_value(self, key: str, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at, MAX_STRING_BYTES)
        if kind not in _SCALARS:
            raise self._fail(f"metadata key {key[:80]!r} has an unknown value type {kind}", at)
        end = self._take(at, struct.calcsize(_SCALARS[kind]))
        value = struct.unpack_from(_SCALARS[kind], self._map, at)[0]
        if kind == _BOOL:
            if value not in (0, 1):
                raise self._fail(f"metadata key {key[:80]!r} is a boolean with the value {value}", at)
            value = bool(value)
        return value, end

    def _read_array(self, key: str, at: int) -> tuple[list[Any], int]:
        start = at
        kind, at = self._number(at, "<I")
        count, at = self._number(at, "<Q")
        if count > MAX_ARRAY_LENGTH:
            raise self._fail(f"metadata key {key[:80]!r} is an array of {count} values", start)
        if kind == _STRING:
            self._take(at, count * 8)  # each string takes at least its length field
            strings: list[Any] = []
            for _ in range(count):
                text, at = self._string(at, MAX_STRING_BYTES)
                strings.append(text)
            return strings, at
        if kind not in _SCALARS:
            what = "an array of arrays" if kind == _ARRAY else f"an array of unknown type {kind}"
            raise self._fail(f"metadata key {key[:80]!r} is {what}", start)
        form = _SCALARS[kind]
        end = self._take(at, count * struct.calcsize(form))
        values = list(struct.unpack_from(f"<{count}{form[1:]}", self._map, at))
        if kind == _BOOL:
            if any(value not in (0, 1) for value in values):
                raise self._fail(f"metadata key {key[:80]!r} is an array of booleans with other values in it", at)
            values = [bool(value) for value in values]
        return values, end

    def _read_place(self, at: int) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        start = at
        name, at = self._string(at, MAX_TENSOR_NAME_BYTES)
        dimensions, at = self._number(at, "<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed", start)
        end = self._take(at, 8 * dimensions)
        shape = tuple(reversed(struct.unpack_from(f"<{dimensions}Q", self._map, at)))
        kind, at = self._number(end, "<I")
        offset, at = self._number(at, "<Q")
        return (name, shape, kind, offset), at

    def _place_tensors(self, places: list[tuple[str, tuple[int, ...], int, int]], header_end: int) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 8 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise FormatError(f"{self.path}: not a valid GGUF file: general.alignment is {str(alignment)[:40]}")
        data_start = -(-header_end // alignment) * alignment
        spans: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in places:
            if kind not in self._sizes:
                raise FormatError(f"{self.path}: tensor {name!r} has the unknown type {kind}; update the gguf package")
            if name in self.tensors:
                raise self._fail(f"tensor {name!r} appears twice", header_end)
            block, size = self._sizes[kind]
            count = math.prod(shape)
            if count == 0 or shape[-1] % block:
                raise self._fail(f"tensor {name!r} has the impossible shape {shape}", header_end)
            nbytes = count // block * size
            begin = data_start + offset
            if offset % alignment or begin + nbytes > len(self._map):
                raise self._fail(
                    f"tensor {name!r} lies at bytes {begin} to {begin + nbytes} of a file of {len(self._map)}, "
                    "or is not aligned",
                    header_end,
                )
            spans.append((begin, begin + nbytes, name))
            self.tensors[name] = GGUFTensor(name, shape, kind, self._type_names[kind], begin, nbytes)
        spans.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
            if begin < end:
                raise self._fail(f"tensors {name!r} and {other!r} overlap", header_end)
