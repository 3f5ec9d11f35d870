"""The weight files of a PaddleNLP folder: whole, in shards with an index, or one for each process that saved them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.paddle.names import Place, Run, Segment, StoredTensor
from arriero.formats.paddle.pdparams_reader import read_pdparams
from arriero.formats.safe_tensors import read_index, weight_files
from arriero.formats.shared_files import PartReader

MODEL_STEM = "model_state"
_UNIFIED, _UNIFIED_INDEX = "peft_model.safetensors", "peft_model.safetensors.index.json"
# 1,024 processes are more than any run that writes a file a process.
_RANKS = r"(?:\.tp(?P<tp>\d{2,4}))?(?:[._]pp(?P<pp>\d{2,4}))?\.pdparams"
_MAX_RANK = 1023
_SLAB_BYTES = 8 * 2**20


class Piece(Protocol):
    """A tensor in a file."""

    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def load(self, *, bfloat16: bool = False) -> Tensor: ...
    def load_box(self, box: tuple[slice, ...], *, bfloat16: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class SafePiece:
    """A tensor in a safetensors file."""

    path: Path
    reader: PartReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.dtype(self.name)

    def load(self, *, bfloat16: bool = False) -> Tensor:
        """The tensor, a view of the mapped file; uint16 as the bits of bfloat16 if asked."""
        return self.load_box(tuple(slice(0, size) for size in self.shape), bfloat16=bfloat16)

    def load_box(self, box: tuple[slice, ...], *, bfloat16: bool = False) -> Tensor:
        """A box of it; see `load`."""
        tensor = self.reader.read(self.name, box)
        return tensor.view(torch.bfloat16) if bfloat16 and tensor.dtype == torch.uint16 else tensor


@dataclass(frozen=True)
class Checkpoint:
    """Open weight files.

    Attributes:
        pieces: what each process of tensor parallelism holds of a tensor, by Paddle's name; one piece of a whole tensor.
        tp: the number of these processes.
        files: that were opened.
        close: unmaps them.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    tp: int
    files: tuple[Path, ...]
    close: Callable[[], None]


def open_model_files(folder: Path, tensor_parallel_degree: int = 1) -> Checkpoint:
    """The weights of a model folder: `model_state.pdparams`, shards with an index, `model_state.tpNN_ppMM.pdparams`, or the
    safetensors files of a unified checkpoint. Optimizer files and `training_args.bin` are never opened.

    Args:
        tensor_parallel_degree: that config.json tells.

    Raises:
        FormatError: when a file is missing or broken, or the index is not to be trusted.
    """
    index = folder / f"{MODEL_STEM}.pdparams.index.json"
    if not (folder / f"{MODEL_STEM}.pdparams").is_file() and index.is_file():
        listed = read_index(index, ".pdparams")
        checkpoint = _open_ranks(
            {(number, 0): folder / name for number, name in enumerate(sorted(set(listed.values())))}
        )
        _check_listed(index, listed, checkpoint)
        return checkpoint
    if find_ranks(folder, MODEL_STEM):
        return open_ranks(folder, MODEL_STEM, tensor_parallel_degree)
    if any(folder.glob("*.safetensors")):
        return _open_safetensors(weight_files(folder))
    raise FormatError(
        f"{folder}: holds no {MODEL_STEM}.pdparams, {MODEL_STEM}.tpNN.pdparams or safetensors file; this is not a Paddle model"
    )


def find_ranks(folder: Path, stem: str) -> dict[tuple[int, int], Path]:
    """The files that processes wrote, by their numbers in the pipeline and in tensor parallelism; just the whole file, if
    there is one.
    """
    whole = folder / f"{stem}.pdparams"
    if whole.is_file():
        return {(0, 0): whole}
    pattern = re.compile(re.escape(stem) + _RANKS)
    found = {}
    for path in sorted(folder.glob(f"{stem}.*.pdparams")):
        match = pattern.fullmatch(path.name)
        if match is not None:
            found[int(match["pp"] or 0), int(match["tp"] or 0)] = path
    return found


def open_ranks(folder: Path, stem: str, tensor_parallel_degree: int = 1) -> Checkpoint:
    """The files of every process, or the whole one.

    Args:
        stem: what the files' names begin with.
        tensor_parallel_degree: that a configuration beside them tells.

    Raises:
        FormatError: naming a process's file that is missing, or one that is broken.
    """
    found = find_ranks(folder, stem)
    if not found:
        raise FormatError(f"{folder}: holds no {stem}.pdparams or {stem}.tpNN.pdparams")
    if (folder / f"{stem}.pdparams") not in found.values():
        _check_ranks(folder, stem, found, tensor_parallel_degree)
    return _open_ranks(found)


def _check_ranks(folder: Path, stem: str, found: Mapping[tuple[int, int], Path], degree: int) -> None:
    stages, ranks = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    if max(stages, ranks) > _MAX_RANK + 1:
        raise FormatError(f"{folder}: a file of process {max(stages, ranks) - 1}; no run has so many")
    if 1 < degree < ranks:
        raise FormatError(f"{folder}: tensor_parallel_degree is {degree}, and there are files of {ranks} processes")
    cut = any(".tp" in path.name for path in found.values())
    staged = any(re.search(r"[._]pp\d", path.name) for path in found.values())
    for stage in range(stages):
        for rank in range(max(ranks, degree) if cut else 1):
            if (stage, rank) not in found:
                parts = ([f"tp{rank:02d}"] if cut else []) + ([f"pp{stage:02d}"] if staged else [])
                raise FormatError(
                    f"{folder / '_'.join(parts).join((f'{stem}.', '.pdparams'))}: is missing; fetch it too"
                )


def _open_ranks(paths: Mapping[tuple[int, int], Path]) -> Checkpoint:
    """Files by (stage, rank): those of a stage hold the same names, those of two stages none in common."""
    opened: dict[tuple[int, int], Mapping[str, Piece]] = {}
    closers: list[Callable[[], None]] = []
    try:
        for at, path in sorted(paths.items()):
            file = read_pdparams(path)
            closers.append(file.close)
            opened[at] = dict(file.tensors)
        tp = max(rank for _, rank in opened) + 1
        pieces: dict[str, tuple[Piece, ...]] = {}
        for stage in sorted({stage for stage, _ in opened}):
            for name in opened[stage, 0]:
                if name in pieces:
                    raise FormatError(f"{paths[stage, 0]}: holds {name}, which {pieces[name][0].path.name} holds too")
            for rank in range(1, tp):
                odd = opened[stage, rank].keys() ^ opened[stage, 0].keys()
                if odd:
                    raise FormatError(f"{paths[stage, rank]}: {sorted(odd)[0]} is not in the files of all processes")
            pieces |= {name: tuple(opened[stage, rank][name] for rank in range(tp)) for name in opened[stage, 0]}
    except BaseException:
        _close_all(closers)
        raise
    return Checkpoint(pieces, tp, tuple(paths.values()), lambda: _close_all(closers))


def _close_all(closers: Iterable[Callable[[], None]]) -> None:
    for close in closers:
        close()


def _check_listed(index: Path, listed: Mapping[str, str], checkpoint: Checkpoint) -> None:
    for name, file in listed.items():
        found = checkpoint.pieces.get(name)
        if found is None or found[0].path.name != file:
            raise FormatError(f"{index}: says that {name[:80]} is in {file}, and it is not; fetch the model again")


def find_adapter_files(folder: Path, stem: str) -> bool:
    """Whether a folder holds an adapter's weights: files of processes, or those of a unified checkpoint."""
    return bool(find_ranks(folder, stem)) or any((folder / name).is_file() for name in (_UNIFIED, _UNIFIED_INDEX))


def open_adapter_files(folder: Path, stem: str, tensor_parallel_degree: int = 1) -> Checkpoint:
    """As `open_ranks`, or `peft_model*.safetensors` of a unified checkpoint, where there are no files of processes.

    Raises:
        FormatError: as `open_ranks`.
    """
    if not find_ranks(folder, stem):
        if (folder / _UNIFIED).is_file():
            return _open_safetensors([folder / _UNIFIED])
        if (folder / _UNIFIED_INDEX).is_file():
            names = sorted(set(read_index(folder / _UNIFIED_INDEX).values()))
            return _open_safetensors([folder / name for name in names])
    return open_ranks(folder, stem, tensor_parallel_degree)


def _open_safetensors(paths: Sequence[Path]) -> Checkpoint:
    pieces: dict[str, tuple[Piece, ...]] = {}
    for path in paths:
        reader = PartReader(path)
        for name in reader.shapes:
            if name in pieces:
                raise FormatError(f"{path}: holds {name}, which {pieces[name][0].path.name} holds too")
            pieces[name] = (SafePiece(path, reader, name),)
    return Checkpoint(pieces, 1, tuple(paths), lambda: None)


def check_pieces(pieces: Sequence[Piece], stored: StoredTensor) -> None:
    """Raises FormatError for pieces that are not those of the tensor, cut as tensor parallelism cuts it."""
    wanted = stored.piece_shape(len(pieces))
    for piece in pieces:
        if tuple(piece.shape) != wanted:
            raise FormatError(
                f"{piece.path}: {stored.name} has the shape {list(piece.shape)}, config.json asks for {list(wanted)}"
                f"{_more_processes(piece, stored, len(pieces))}"
            )
        if piece.dtype != pieces[0].dtype:
            raise FormatError(f"{piece.path}: {stored.name} has another dtype than in {pieces[0].path.name}")
        tensor_dtype(piece, stored.name)


def _more_processes(piece: Piece, stored: StoredTensor, tp: int) -> str:
    """What to do where a piece looks cut for more processes than there are files of."""
    axis, shape = stored.axis, tuple(piece.shape)
    if axis is None or len(shape) != len(stored.shape) or not shape[axis] or stored.shape[axis] % shape[axis]:
        return ""
    count = stored.shape[axis] // shape[axis]
    if count <= tp or shape != stored.piece_shape(count):
        return ""
    return f": it is cut for {count} processes and {tp} of their files are here; fetch the others too"


def tensor_dtype(piece: Piece, name: str) -> torch.dtype:
    """Of the numbers in a piece. A uint16 is the bits of a bfloat16: NumPy has none, and Paddle no other use for it.

    Raises:
        FormatError: for integers, which only quantized weights are.
    """
    if piece.dtype == torch.uint16:
        return torch.bfloat16
    if not piece.dtype.is_floating_point or piece.dtype.itemsize < 2:
        kind = str(piece.dtype).removeprefix("torch.")
        raise FormatError(f"{piece.path}: {name} has the dtype {kind}; quantized Paddle weights are not read")
    return piece.dtype


def join(pieces: Sequence[Piece], place: Place) -> Tensor:
    """A tensor in the HF folder's layout: a view of its file where it lies there so.

    Raises:
        FormatError: when processes hold different values of what they should all hold.
    """
    stored, axis = place.stored, len(place.stored.shape) - 1 if place.stored.axis is None else place.stored.axis
    if stored.axis is None and len(pieces) > 1:
        _check_equal(pieces, stored.name)
    segments = stored.segments(len(pieces))
    if len(segments) == 1 and place.runs[0].size == stored.shape[-1] and not place.transposed:
        return pieces[0].load(bfloat16=True)
    result = torch.empty(place.shape, dtype=tensor_dtype(pieces[0], stored.name))
    target = result.t() if place.transposed else result
    columns = place.runs if axis == len(stored.shape) - 1 else (Run(0, 0, stored.shape[axis]),)
    for rank, piece in enumerate(pieces):
        moves = _moves([segment for segment in segments if segment.rank == rank], columns)
        for first, rows in _slabs(piece) if moves else ():
            _copy(rows, first, moves, target, axis)
    return result


@dataclass(frozen=True)
class _Move:
    """A run along an axis that goes from a process's piece into a tensor.

    Attributes:
        source: where it starts in the piece.
        target: where it starts in the tensor.
        size: of the run.
    """

    source: int
    target: int
    size: int


def _moves(segments: Sequence[Segment], runs: Sequence[Run]) -> list[_Move]:
    """What of a stored tensor's segments belongs to the runs of the tensor that is wanted."""
    moves = []
    for segment in segments:
        for run in runs:
            start = max(segment.whole_start, run.stored_start)
            stop = min(segment.whole_start + segment.size, run.stored_start + run.size)
            if start < stop:
                source = segment.start + start - segment.whole_start
                moves.append(_Move(source, run.start + start - run.stored_start, stop - start))
    return moves


def _slabs(piece: Piece) -> Iterator[tuple[int, Tensor]]:
    """A piece, some rows at a time with the number of the first: in a file of Paddle's arrays need not be aligned, and
    what is not is copied as it is read.
    """
    rest = tuple(slice(0, size) for size in piece.shape[1:])
    step = max(1, _SLAB_BYTES // max(1, prod(piece.shape[1:]) * piece.dtype.itemsize))
    for start in range(0, piece.shape[0], step):
        yield start, piece.load_box((slice(start, min(start + step, piece.shape[0])), *rest), bfloat16=True)


def _copy(rows: Tensor, first: int, moves: Sequence[_Move], target: Tensor, axis: int) -> None:
    """Carry out what concerns some rows of a piece.

    Args:
        first: the number of the first row in the piece.
    """
    if axis > 0:
        into = target.narrow(0, first, len(rows))
        for move in moves:
            into.narrow(axis, move.target, move.size).copy_(rows.narrow(axis, move.source, move.size))
        return
    for move in moves:
        start, stop = max(first, move.source), min(first + len(rows), move.source + move.size)
        if start < stop:
            into = target.narrow(0, move.target + start - move.source, stop - start)
            into.copy_(rows.narrow(0, start - first, stop - start))


def _check_equal(pieces: Sequence[Piece], name: str) -> None:
    first = pieces[0].load().contiguous().view(-1).view(torch.uint8)
    for piece in pieces[1:]:
        if not torch.equal(first, piece.load().contiguous().view(-1).view(torch.uint8)):
            raise FormatError(
                f"{piece.path}: {name} differs from that in {pieces[0].path.name}, and each process should hold the same: "
                "the files are of different steps, or of a run that went wrong"
            )
