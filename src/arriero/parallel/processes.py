"""The processes of a run and what they tell each other besides tensors of the model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from arriero.config.launched import launched_rank
from arriero.config.launched import launched_size as launched_size
from arriero.config.layout import AXES, Coordinates, Layout
from arriero.errors import ArrieroError, ConfigError, PeerError

T = TypeVar("T")
TIMEOUT_VARIABLE = "ARRIERO_TIMEOUT"  # seconds without an answer after which a process gives its peers up
DEFAULT_TIMEOUT = 600.0
PATIENCE = timedelta(hours=12)


@dataclass
class Processes:
    """One process and its peers. Alone, nothing is sent and every method returns its argument.

    Messages are numbers and JSON, never pickles.

    Attributes:
        channel: the group that numbers go over, None for that of all processes.
        patient: the group that messages about files go over: a peer that is alive may read or write one for hours; one
            that is dead is noticed at once all the same.
    """

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    mesh: DeviceMesh | None = None
    channel: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives the first time: groups of processes are dear (three threads each) and never given back.

        Every process must call it at the same point.
        """
        if name not in self._kept:
            self._kept[name] = make()
        result: T = self._kept[name]
        return result

    @property
    def size(self) -> int:
        return self.layout.size

    @property
    def alone(self) -> bool:
        return self.mesh is None

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: writes logs, and files that are written once."""
        return self.rank == 0

    @property
    def at(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.rank)

    @property
    def independent_rank(self) -> int:
        """A number for random draws: the same only where processes share out one matrix and must draw alike."""
        return self.rank // self.layout.tp

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one on one axis only."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def side_channel(self) -> Processes:
        """The same processes over a group of their own, for a thread beside the one that trains: their messages never mix.

        Every process must call it at the same point.
        """
        if self.mesh is None:
            return self
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return replace(self, channel=group, patient=group)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes of each number, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM, self.channel)

    def max(self, values: Sequence[float]) -> list[float]:
        """The greatest over all processes of each number."""
        return self._reduce(values, dist.ReduceOp.MAX, self.channel)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return self.max([float(flag)])[0] > 0.0

    def _reduce(self, values: Sequence[float], operation: Any, group: dist.ProcessGroup | None) -> list[float]:
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=group)
        return list(tensor.tolist())

    def exchange(self, value: Any) -> list[Any]:
        """What every process gives, as JSON, in the order of the ranks."""
        if self.mesh is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        own = [float(data.numel()) * (r == self.rank) for r in range(self.size)]
        sizes = [int(size) for size in self._reduce(own, dist.ReduceOp.SUM, self.patient)]
        longest = max(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.patient)
        return [json.loads(bytes(tensor[:size].tolist())) for tensor, size in zip(received, sizes, strict=True)]

    def by_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something (its result is JSON) and give every process the result.

        Raises:
            ArrieroError: what was raised in rank 0.
            PeerError: in the others then.
        """
        if self.mesh is None:
            return work()
        with self.together():
            result = work() if self.first else None
        return self.exchange(result)[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails everywhere if it fails anywhere; no process leaves it before all are through.

        Raises:
            PeerError: where it went well itself, naming the rank that failed.
        """
        if self.mesh is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            if not getattr(error, "peers_know", False):  # of a block inside this one
                error.peers_know = True  # type: ignore[attr-defined]
                self.exchange(_reason(error))
            raise
        failures = [(rank, said) for rank, said in enumerate(self.exchange(None)) if said is not None]
        if failures:
            rank, said = failures[0]
            failure = PeerError(f"rank {rank} failed ({said})")
            failure.peers_know = True
            raise failure


def _reason(error: BaseException) -> str:
    """What went wrong, for the other processes: in the words of the system where there are any."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] if isinstance(error, ArrieroError) else type(error).__name__


def backend_of(device: torch.device) -> str:
    """Numbers and JSON always travel between hosts' memories; tensors of a GPU from GPU to GPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def silence_limit() -> timedelta:
    """How long a process may say nothing before its peers give it up.

    Raises:
        ConfigError: the variable is no number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return timedelta(seconds=DEFAULT_TIMEOUT)
    try:
        limit = timedelta(seconds=float(text))
    except (ValueError, OverflowError):  # inf and nan too
        limit = timedelta(0)
    if limit <= timedelta(0):
        raise ConfigError(f"{TIMEOUT_VARIABLE} is {text!r}: give a number of seconds above 0")
    return limit


def start(layout: Layout, device: torch.device) -> Processes:
    """Join the other processes that the launcher started.

    Raises:
        ConfigError: if they cannot be reached, or the launcher's variables do not say which of them this is.
    """
    size = launched_size()
    if size == 1:
        return Processes(layout)
    rank = launched_rank(size)
    timeout = silence_limit()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend_of(device), timeout=timeout)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"the other processes cannot be reached at {where} ({' '.join(str(error).split())[:200]}): "
                "check --master, and that every process is started"
            ) from error
    mesh = mesh_of(device, layout.degrees, AXES)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(layout, rank, mesh, patient=patient)


def mesh_of(device: torch.device, degrees: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """A mesh of all processes, whose groups give a silent peer up after the same time as all others."""
    mesh = init_device_mesh(device.type, tuple(degrees), mesh_dim_names=tuple(names))
    for name in names:
        set_timeout(mesh.get_group(name))
    return mesh


def set_timeout(group: dist.ProcessGroup) -> None:
    """Give a group the timeout of the run: torch makes groups of a mesh with one of its own."""
    if dist.get_backend() != "fake":
        dist.distributed_c10d._set_pg_timeout(silence_limit(), group)


def stop(processes: Processes) -> None:
    """Leave in order: every process is done before the first is gone."""
    if processes.mesh is not None and dist.is_initialized():
        processes.barrier()
        dist.destroy_process_group()
