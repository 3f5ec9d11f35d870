"""Safetensors files that several processes write together, and read each its own part of.

What the files hold is agreed first; then the first process creates them at their full length (a full disk is found before
anything is written), and every process writes its boxes where they belong. The result does not depend on how the tensors
are shared out: a lone process, which holds everything, writes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.box_writing import placement_of, write_box
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.file_chunks import reserve, write_at
from arriero.formats.mapped_file import MappedFile
from arriero.formats.parts import Part, Placement
from arriero.formats.safe_tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    LazyTensor,
    checked_entries,
    readable,
    stored_dtype,
    weight_files,
)
from arriero.formats.safetensors_header import build_header, dtype_of_name, name_of_dtype
from arriero.formats.staging import staged_folder, write_error

State = (
    Mapping[str, Tensor]
    | Mapping[str, LazyTensor]
    | Mapping[str, Tensor | LazyTensor]
    | Mapping[str, Part]
    | Mapping[str, Tensor | LazyTensor | Part]
)
# name -> dtype and shape of the whole tensor
Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# Upper bounds of what a file's header takes beside the tensors' names.
_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 64, 160


class Peers(Protocol):
    """The processes that write together; see `arriero.parallel.processes.Processes`."""

    @property
    def first(self) -> bool: ...
    def exchange(self, value: Any) -> list[Any]: ...
    def together(self) -> AbstractContextManager[None]: ...


class _Alone:
    """A process without peers."""

    first = True

    def exchange(self, value: Any) -> list[Any]:
        return [value]

    def together(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


ALONE = _Alone()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 9 comes before layer 10."""
    words = re.split(r"([0-9]+)", name)
    return [(int(word), "") if number % 2 else (-1, word) for number, word in enumerate(words)]


def agree(state: State, peers: Peers = ALONE, dtype: torch.dtype | None = None, order: Sequence[str] = ()) -> Plan:
    """What all processes together write.

    Args:
        state: this process's tensors, its parts of tensors, or what makes them, by name.
        dtype: to cast floating-point tensors to; None keeps each one's.
        order: names of the whole set that come first, in this order; the others follow in natural order. Without peers
            and without an order, that of `state`.

    Raises:
        FormatError: if processes disagree about a tensor, or their parts do not make up all of it.
    """
    own = {}
    with peers.together():
        for name, value in state.items():
            placement = placement_of(value)
            if placement.writes:
                kind = _cast(value.tensor.dtype if isinstance(value, Part) else value.dtype, dtype)
                own[name] = [name_of_dtype(kind), list(placement.shape), prod(placement.size)]
    told = peers.exchange(own)
    found: dict[str, list[Any]] = {}
    for entries in told:
        for name, (kind, shape, count) in entries.items():
            entry = found.setdefault(name, [kind, shape, 0])
            if entry[:2] != [kind, shape]:
                raise FormatError(
                    f"{name} is {entry[0]} {entry[1]} in one process and {kind} {shape} in another: "
                    "start all of them with the same options"
                )
            entry[2] += count
    for name, (_, shape, count) in found.items():
        if count != prod(shape):
            raise FormatError(f"the processes hold {count} of the {prod(shape)} numbers of {name} {shape}")
    names = list(found)
    if len(told) > 1 or order:
        position = {name: number for number, name in enumerate(order)}
        names.sort(key=lambda name: (position.get(name, len(position)), natural_order(name)))
    return {name: (dtype_of_name(found[name][0]), tuple(found[name][1])) for name in names}


def plan_files(plan: Plan, max_shard_size: int) -> dict[str, list[str]]:
    """The names in each file: `model.safetensors`, or as many shards as `max_shard_size` asks for.

    Args:
        max_shard_size: of a file in bytes; a single larger tensor gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    used = _HEADER_BYTES
    for name, (dtype, shape) in plan.items():
        space = prod(shape) * dtype.itemsize + len(name) + _HEADER_BYTES_PER_TENSOR
        if shards[-1] and used + space > max_shard_size:
            shards.append([])
            used = _HEADER_BYTES
        shards[-1].append(name)
        used += space
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}


def write_tensors(
    state: State,
    folder: Path,
    *,
    max_shard_size: int,
    dtype: torch.dtype | None = None,
    peers: Peers = ALONE,
    order: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write weights as `model.safetensors`, or as shards with an index when they exceed `max_shard_size`.

    One tensor at a time is made, cast or brought from a device. Only floating-point tensors are cast. Every process calls
    this, with its own parts; see `agree` for the arguments.

    Args:
        folder: an existing folder, which every process sees.
        progress: told bytes done and bytes in all, after each tensor of this process.

    Returns:
        The file of each tensor.

    Raises:
        OSError: when a file cannot be written.
        PeerError: when it went wrong in another process.
    """
    plan = agree(state, peers, dtype, order)
    files = plan_files(plan, max_shard_size)
    _write_files(state, plan, {folder / file: names for file, names in files.items()}, peers, progress)
    found = {name: file for file, names in files.items() for name in names}
    with peers.together():
        if peers.first and len(files) > 1:
            size = sum(prod(shape) * kind.itemsize for kind, shape in plan.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(found.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return found


def write_tensor_file(state: State, path: Path, peers: Peers = ALONE) -> None:
    """Write one safetensors file (not atomic: see `shared_folder`); every process calls this, with its own parts.

    Raises:
        OSError: when it cannot be written.
        PeerError: when it went wrong in another process.
    """
    plan = agree(state, peers)
    _write_files(state, plan, {path: list(plan)}, peers)


def _write_files(
    state: State,
    plan: Plan,
    files: Mapping[Path, Sequence[str]],
    peers: Peers,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    size = sum(prod(shape) * dtype.itemsize for dtype, shape in plan.values())
    done = 0

    def advance(name: str) -> None:
        nonlocal done
        done += prod(plan[name][1]) * plan[name][0].itemsize
        if progress is not None:
            progress(done, size)

    headers = {path: build_header({name: plan[name] for name in names}) for path, names in files.items()}
    with peers.together():
        if peers.first:
            for path, (header, _, length) in headers.items():
                _create(path, header, length)
    with peers.together(), ChunkWriter(size) as writer:
        for path, names in files.items():
            own = [name for name in names if name in state and placement_of(state[name]).writes]
            if own:
                _write_boxes(path, {name: state[name] for name in own}, plan, headers[path][1], advance, writer)


def _create(path: Path, header: bytes, length: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        reserve(descriptor, 0, length)
        write_at(descriptor, memoryview(header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_boxes(
    path: Path,
    state: State,
    plan: Plan,
    starts: Mapping[str, int],
    advance: Callable[[str], None],
    writer: ChunkWriter,
) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with writer.filling():
            for name, value in state.items():
                write_box(descriptor, name, value, plan[name][0], starts[name], writer)
                advance(name)
        os.fsync(descriptor)  # each on its own machine, where several share the folder
    finally:
        os.close(descriptor)


def _cast(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point else dtype


@contextlib.contextmanager
def shared_folder(folder: str | Path, peers: Peers = ALONE, *, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """The `staged_folder` of the first process, for all of them.

    A block in it must fail in every process if it fails in one (`Peers.together`).

    Raises:
        FormatError: when a file cannot be written, with the reason.
        PeerError: when that was so in another process.
    """
    try:
        with ExitStack() as stack:
            name = ""
            with peers.together():
                if peers.first:
                    name = str(stack.enter_context(staged_folder(folder, replaces=replaces)))
            yield Path(peers.exchange(name)[0])
            with peers.together():
                stack.close()
    except OSError as error:
        raise write_error(Path(folder), error) from error


@dataclass(frozen=True)
class _Stored:
    file: MappedFile
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class PartReader:
    """Reads boxes of the tensors of a model folder, or of one safetensors file.

    Files are mapped: a process reads the pages of its own boxes only, and what is read takes no memory of its own until it
    is copied.

    Raises:
        FormatError: when a file is missing or broken, or two files hold the same tensor.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self._stored: dict[str, _Stored] = {}
        for path in weight_files(self.source) if self.source.is_dir() else [self.source]:
            entries = checked_entries(path)
            with readable(path):
                file = MappedFile(path)
            for name, (kind, shape, start, _) in sorted(entries.items()):
                if name in self._stored:
                    other = self._stored[name].path.name
                    raise FormatError(f"{path}: holds {name}, which {other} holds too; fetch the model again")
                self._stored[name] = _Stored(file, path, kind, shape, start)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every whole tensor."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def dtype(self, name: str) -> torch.dtype:
        """Of a stored tensor.

        Raises:
            FormatError: if there is none of this name, or torch has no such dtype.
        """
        stored = self._find(name)
        return stored_dtype(stored.path, name, stored.dtype)

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> Tensor:
        """A box of a tensor (all of it if not given), as a view of the mapped file, on the CPU.

        Raises:
            FormatError: if there is no tensor of this name, or it cannot be read.
        """
        stored = self._find(name)
        tensor = stored.file.view(stored.start, self.dtype(name), stored.shape)
        return tensor if box is None else tensor[box]

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and where in it the tensor begins, in bytes.

        Raises:
            FormatError: if there is no tensor of this name.
        """
        stored = self._find(name)
        return stored.path, stored.start

    def read_part(self, name: str, placement: Placement) -> Tensor:
        """This process's part of a tensor; see `read`.

        Raises:
            FormatError: also if the whole tensor has another shape than the placement's.
        """
        stored = self._find(name)
        if stored.shape != placement.shape:
            raise FormatError(
                f"{stored.path}: {name} is {list(stored.shape)} and this run needs {list(placement.shape)}: "
                "is it of another model?"
            )
        return self.read(name, placement.box)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise FormatError(f"{self.source}: tensor {name} is missing")
        return self._stored[name]
