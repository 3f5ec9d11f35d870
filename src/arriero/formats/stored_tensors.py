"""The tensors of a file as they are stored, from its header alone."""

from __future__ import annotations

import struct
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from arriero.errors import FormatError
from arriero.formats.detection import Found, file_type
from arriero.formats.safetensors_header import dtype_of_name, read_entries

MAX_NPY_HEADER_BYTES = 10_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: that the file gives it.
        dtype: as torch calls it ("bfloat16"), or as ggml does ("Q4_1").
        shape: in PyTorch's order of dimensions.
        nbytes: that it takes in the file.
        file: it is in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    @property
    def numbers(self) -> int:
        return prod(self.shape)


def stored_tensors(found: Found) -> list[StoredTensor]:
    """The tensors of all weight files of a model or adapter.

    Raises:
        FormatError: when a file is missing or broken.
    """
    return [tensor for path in weight_paths(found) for tensor in tensors_of_file(path)]


def weight_paths(found: Found) -> list[Path]:
    """The weight files of a model or adapter, in order.

    Raises:
        FormatError: when an index is broken, or names a file that is missing.
    """
    from arriero.formats.bin_folder import bin_files
    from arriero.formats.meta.reader import shard_files
    from arriero.formats.safe_tensors import INDEX_FILE, SINGLE_FILE, read_index, weight_files

    folder = found.path
    match found.kind:
        case "hf":
            return weight_files(folder)
        case "hf-shards":
            return sorted(folder.glob("model-tp*.safetensors"))
        case "hf-bin":
            return bin_files(folder)
        case "gguf" | "gguf-lora":
            return [folder]
        case "meta":
            return shard_files(folder)
        case "peft-lora" | "peft-prefix":
            names = ("adapter_model.safetensors", "adapter_model.bin", "prefix_encoder.safetensors")
            return [folder / name for name in names if (folder / name).is_file()]
        case "paddle-lora":
            return sorted(folder.glob("lora_model_state*.pdparams"))
        case "paddle-prefix":
            return [*sorted(folder.glob("prefix_model_state*.pdparams")), *folder.glob("pre_caches.npy")]
        case "paddle":
            index = folder / "model_state.pdparams.index.json"
            if (folder / "model_state.pdparams").is_file():
                return [folder / "model_state.pdparams"]
            if index.is_file():
                return [folder / name for name in sorted(set(read_index(index, ".pdparams").values()))]
            pickles = sorted(folder.glob("model_state*.pdparams"))
            unified = (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()
            return pickles or (weight_files(folder) if unified else [])
        case _:
            return []


def tensors_of_file(path: Path) -> list[StoredTensor]:
    """The tensors of a .safetensors, .gguf, .pdparams, .npy or torch.save file.

    Raises:
        FormatError: it is none of these, or broken.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        reader = _reader_of(path, start)
        if reader is None:
            looks, advice = file_type(path, start)
            raise FormatError(f"{path}: {looks}; {advice}")
        return reader(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error


def _reader_of(path: Path, start: bytes) -> Callable[[Path], list[StoredTensor]] | None:
    if start[:4] == b"GGUF":
        return _gguf
    if start[:6] == b"\x93NUMPY":
        return _npy
    if path.suffix == ".pdparams":
        return _pdparams
    if path.suffix == ".safetensors":
        return _safetensors
    return _torch if path.suffix in (".bin", ".pt", ".pth") else None


def _safetensors(path: Path) -> list[StoredTensor]:
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty; fetch it again")
    try:
        with safe_open(path, framework="np"):
            entries = read_entries(path)
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: is not a valid safetensors file ({reason}); fetch it again") from error
    return [
        StoredTensor(name, _torch_name(kind), shape, end - start, path)
        for name, (kind, shape, start, end) in entries.items()
    ]


def _torch_name(kind: str) -> str:
    try:
        return str(dtype_of_name(kind)).removeprefix("torch.")
    except FormatError:  # a format of few bits that torch has no type for
        return kind


def _gguf(path: Path) -> list[StoredTensor]:
    from arriero.formats.gguf.file import GGUFFile

    with GGUFFile(path) as file:
        return [StoredTensor(t.name, t.type_name, t.shape, t.nbytes, path) for t in file.tensors.values()]


def _pdparams(path: Path) -> list[StoredTensor]:
    from arriero.formats.paddle.pdparams_reader import read_pdparams

    with read_pdparams(path) as file:
        return [
            # NumPy has no bfloat16, so Paddle keeps its bits as uint16
            StoredTensor(name, _bits(str(t.dtype).removeprefix("torch.")), tuple(t.shape), t.nbytes, path)
            for name, t in file.tensors.items()
        ]


def _bits(kind: str) -> str:
    return "bfloat16" if kind == "uint16" else kind


def _torch(path: Path) -> list[StoredTensor]:
    from arriero.formats.torch_files import read_torch_file

    with read_torch_file(path) as file:
        return [
            StoredTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size(), path)
            for name, t in file.tensors.items()
        ]


# What NumPy, and Python's tokenizer that it reads a header with, say of bytes that are none.
_BROKEN_NPY = (
    *(
        ValueError,
        TypeError,
        SyntaxError,
        EOFError,
        RecursionError,
        MemoryError,
        OverflowError,
        AttributeError,
        KeyError,
    ),
    *(struct.error, tokenize.TokenError),
)


def _npy(path: Path) -> list[StoredTensor]:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file, max_header_size=MAX_NPY_HEADER_BYTES)
            start = file.tell()
    except _BROKEN_NPY as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{path}: is not a valid .npy file ({reason}); fetch it again") from error
    if dtype.hasobject or dtype.names is not None:
        raise FormatError(f"{path}: holds Python objects and not numbers; it is never opened")
    nbytes = prod(shape) * dtype.itemsize
    if any(size < 0 for size in shape) or start + nbytes != path.stat().st_size:
        raise FormatError(f"{path}: announces {nbytes} bytes of numbers and has {path.stat().st_size - start}")
    return [StoredTensor(path.stem, dtype.name, tuple(shape), nbytes, path)]
