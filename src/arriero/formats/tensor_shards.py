"""A model folder with one weight file a process: `model-tp00-of-04.safetensors` and so on.

With a pipeline the files are called `model-tp00-of-02-pp01-of-02.safetensors`. Beside them lie config.json and the
tokenizer's files. Tensors have the names of the whole model; each file holds what its process holds
(`arriero.models.tensor_split`): a run of a matrix, and a tensor that is not cut in every file of its pipeline stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.name_list import listed
from arriero.formats.parts import Placement
from arriero.formats.safe_tensors import INDEX_FILE, SINGLE_FILE, LazyTensor
from arriero.formats.shared_files import PartReader
from arriero.models.config import LlamaConfig
from arriero.models.tensor_split import Cut, cut_of, possible_degrees
from arriero.models.weight_shapes import weight_shapes

_FILE = re.compile(r"model-tp([0-9]{2,5})-of-([0-9]{2,5})(?:-pp([0-9]{2,5})-of-([0-9]{2,5}))?\.safetensors")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shard_file(tp_rank: int, tp: int, pp_rank: int = 0, pp: int = 1) -> str:
    """The name of one process's file."""
    pipeline = f"-pp{pp_rank:02d}-of-{pp:02d}" if pp > 1 else ""
    return f"model-tp{tp_rank:02d}-of-{tp:02d}{pipeline}.safetensors"


def shard_metadata(tp_rank: int, tp: int, pp_rank: int = 0, pp: int = 1) -> dict[str, str]:
    """What the header of one process's file says of itself."""
    return {
        "format": "pt",
        "tensor_parallel_degree": str(tp),
        "tensor_parallel_rank": str(tp_rank),
        "pipeline_parallel_degree": str(pp),
        "pipeline_parallel_rank": str(pp_rank),
    }


def is_sharded(folder: str | Path) -> bool:
    """Whether the weights of a folder are in one file a process; ordinary weight files beside them go first."""
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file() or not folder.is_dir():
        return False
    return any(_FILE.fullmatch(path.name) for path in folder.glob("model-tp*.safetensors"))


def check_degree(config: LlamaConfig, tp: int, source: str | Path) -> None:
    """Raises FormatError where so many processes cannot share out the heads."""
    possible = possible_degrees(config)
    if tp not in possible:
        raise FormatError(
            f"{source}: {config.num_attention_heads} heads with {config.num_key_value_heads} key-value heads cannot be "
            f"shared out among {tp} tensor-parallel processes (possible: {', '.join(map(str, possible))})"
        )


def piece_shape(name: str, shape: tuple[int, ...], config: LlamaConfig, tp: int, rank: int) -> tuple[int, ...]:
    """Shape of what one process holds of a tensor."""
    cut = cut_of(name, shape, config, tp, rank)
    return tuple(cut.size if dim == cut.dim else size for dim, size in enumerate(shape))


class ShardedState:
    """The weights of a folder of shards, joined one at a time as they are read.

    Attributes:
        tp, pp: processes that share out each matrix, and the layers.
        shapes: of every whole tensor, in the model's order.

    Raises:
        FormatError: when a file is missing or broken, or what the files hold is not this model in these degrees.
    """

    def __init__(self, folder: str | Path, config: LlamaConfig) -> None:
        self.folder, self.config = Path(folder), config
        self.tp, self.pp = _degrees(self.folder)
        check_degree(config, self.tp, self.folder)
        self._readers: dict[str, list[PartReader]] = {}
        for pp_rank in range(self.pp):
            readers = [self._open(tp_rank, pp_rank) for tp_rank in range(self.tp)]
            _check_same_names(readers)
            for name in readers[0].shapes:
                if name in self._readers:
                    other = self._readers[name][0].source.name
                    raise FormatError(f"{readers[0].source}: holds {name}, which {other} holds too")
                self._readers[name] = readers
        self.shapes = self._check_names()
        for name, shape in self.shapes.items():
            self._check_pieces(name, shape)

    def _open(self, tp_rank: int, pp_rank: int) -> PartReader:
        path = self.folder / shard_file(tp_rank, self.tp, pp_rank, self.pp)
        reader = PartReader(path)
        _check_metadata(path, shard_metadata(tp_rank, self.tp, pp_rank, self.pp))
        return reader

    def _check_names(self) -> dict[str, tuple[int, ...]]:
        # Before anything is built: a hostile number of layers would take minutes even without memory.
        if self.config.num_hidden_layers > len(self._readers):
            raise FormatError(
                f"{self.folder}: {self.config.num_hidden_layers} layers are announced, but there are only "
                f"{len(self._readers)} tensors"
            )
        shapes = weight_shapes(self.config)
        missing = [name for name in shapes if name not in self._readers]
        if missing:
            raise FormatError(f"{self.folder}: missing {listed(missing)} (config.json needs it) in every shard")
        unknown = [name for name in self._readers if name not in shapes]
        if unknown:
            raise FormatError(
                f"{self.folder}: unexpected {listed(unknown)}; config.json does not describe these weights"
            )
        return shapes

    def _check_pieces(self, name: str, shape: tuple[int, ...]) -> None:
        readers = self._readers[name]
        dtype = readers[0].dtype(name)
        for rank, reader in enumerate(readers):
            needed = piece_shape(name, shape, self.config, self.tp, rank)
            if reader.shapes[name] != needed:
                raise FormatError(
                    f"{reader.source}: {name} has the shape {list(reader.shapes[name])}, config.json asks for "
                    f"{list(needed)} here"
                )
            if reader.dtype(name) not in _DTYPES:
                raise FormatError(f"{reader.source}: {name} is not a float16, bfloat16, float32 or float64 tensor")
            if reader.dtype(name) != dtype:
                words = (str(kind).removeprefix("torch.") for kind in (reader.dtype(name), dtype))
                raise FormatError(f"{reader.source}: {name} is {' and in another shard '.join(words)}")

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._reader(name, 0).dtype(name)

    def piece(self, name: str, rank: int) -> Tensor:
        """What process `rank` of `tp` holds of a tensor, as a view of the mapped file."""
        return self._reader(name, rank).read(name)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """A whole tensor, or a box of it. What lies in one piece is mapped; what is joined of several takes memory.

        Only the pieces that hold a part of it are read: processes of the folder's own degrees read a file each.

        Raises:
            FormatError: if files that should hold the same differ.
        """
        shape = self.shapes[name]
        wanted = box or tuple(slice(0, size) for size in shape)
        parts: list[Tensor] = []
        for rank in range(self.tp):
            cut = cut_of(name, shape, self.config, self.tp, rank)
            index = _index_in(wanted, cut)
            if index is None:
                continue
            part = self.piece(name, rank)[index]
            if cut.copy == 0:
                parts.append(part)
            elif not _same_bits(part, parts[-1]):
                raise FormatError(
                    f"{self._reader(name, rank).source}: {name} differs from that in "
                    f"{self._reader(name, rank - cut.copy).source.name}, and both should hold the same"
                )
        if not parts:
            return self.piece(name, 0).new_empty([part.stop - part.start for part in wanted])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.dim or 0)

    def read_part(self, name: str, placement: Placement) -> Tensor:
        """This process's part of a tensor.

        Raises:
            FormatError: if the whole tensor is missing or has another shape than the placement's, and as `read` does.
        """
        if self.shapes.get(name) != placement.shape:
            raise FormatError(
                f"{self.folder}: {name} is {list(self.shapes.get(name, ()))} and this run needs "
                f"{list(placement.shape)}: is it of another model?"
            )
        return self.read(name, placement.box)

    def lazy(self) -> dict[str, LazyTensor]:
        """All tensors by name, each joined when it is loaded."""

        def make(name: str) -> LazyTensor:
            return LazyTensor(self.shapes[name], self.dtype(name), lambda: self.read(name))

        return {name: make(name) for name in self.shapes}

    def _reader(self, name: str, rank: int) -> PartReader:
        if name not in self._readers:
            raise FormatError(f"{self.folder}: tensor {name} is missing")
        return self._readers[name][rank]


def _degrees(folder: Path) -> tuple[int, int]:
    """Degrees of tensor and pipeline parallelism that the names of the files tell; every file must be there."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("model-tp*.safetensors")):
        match = _FILE.fullmatch(path.name)
        if match is not None:
            found[path.name] = (int(match[2]), int(match[4] or 1))
    if not found:
        raise FormatError(f"{folder}: holds no {shard_file(0, 2)} or the like")
    names = {degrees: name for name, degrees in found.items()}
    if len(names) > 1:
        one, other = sorted(names.values())[:2]
        raise FormatError(f"{folder}: holds shards of different degrees ({one}, {other}): keep one set of them")
    ((tp, pp),) = names
    left = set(found)
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            name = shard_file(tp_rank, tp, pp_rank, pp)
            if name not in left:
                raise FormatError(f"{folder}: {name} is missing; every process's file is needed")
            left.remove(name)
    if left:
        raise FormatError(f"{folder}: {min(left)} is a file of no process of {tp} x {pp}: remove it")
    return tp, pp


def _check_metadata(path: Path, needed: Mapping[str, str]) -> None:
    """A renamed file is found out by what it says of itself, where it says so."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    for key, value in needed.items():
        if key != "format" and told.get(key, value) != value:
            raise FormatError(
                f"{path}: says of itself {key} {told[key][:20]!r}, its name says {value!r}: was it renamed? Fetch it again"
            )


def _check_same_names(readers: list[PartReader]) -> None:
    """Every file of a pipeline stage must hold the same tensors, or parts of them."""
    first = readers[0]
    for reader in readers[1:]:
        for name in first.shapes.keys() ^ reader.shapes.keys():
            without, with_it = (reader, first) if name in first else (first, reader)
            raise FormatError(f"{without.source}: {name} is missing, which {with_it.source.name} holds")


def _index_in(box: tuple[slice, ...], cut: Cut) -> tuple[slice, ...] | None:
    """Which of a piece's elements lie in a box of the whole tensor; None for none."""
    if cut.dim is None:
        return box
    wanted = box[cut.dim]
    start, stop = max(wanted.start, cut.start), min(wanted.stop, cut.start + cut.size)
    if start >= stop:
        return None
    return (*box[: cut.dim], slice(start - cut.start, stop - cut.start), *box[cut.dim + 1 :])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
