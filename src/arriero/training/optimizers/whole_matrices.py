"""For update rules that need whole matrices, of which each process holds a box."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.config.layout import Coordinates
from arriero.formats.parts import Placement
from arriero.parallel.processes import Processes, set_timeout

AXES = ("dp_shard", "cp", "tp")  # that cut matrices


@dataclass(frozen=True)
class _Box:
    """First row and column, rows and columns of what one process holds of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def index(self) -> tuple[slice, slice]:
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class WholeMatrices:
    """Puts matrices together, one in each process at a time, so that the processes share out the work on them.

    A round takes as many matrices as there are processes: each process sends its box of every one to the process that works
    on it, and gets its box of the result back. No process holds more than one whole matrix.

    Args:
        placements: of the matrices, also of those of which this process holds nothing; the same names in every process of
            the group.
        processes: every one of them must make this object at the same point.
    """

    def __init__(self, placements: Mapping[str, Placement], processes: Processes) -> None:
        self.shapes = {name: where.shape for name, where in placements.items()}
        self.group = _holders(processes)
        self.device: torch.device | None = None  # where the work is done; None: where the matrices are
        names = sorted(placements, key=lambda name: prod(self.shapes[name]))  # equal work in a round
        size = self.group.size() if self.group is not None else 1
        self.rounds = [names[start : start + size] for start in range(0, len(names), size)]
        if self.group is None or not names:
            return
        assert processes.mesh is not None
        self.device = torch.device(processes.mesh.device_type)
        self.rank = self.group.rank()
        own = torch.tensor([(*placements[name].offset, *placements[name].size) for name in names], device=self.device)
        told = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(told, own, group=self.group)
        self.boxes = dict(
            zip(names, zip(*([_Box(*box) for box in one.tolist()] for one in told), strict=True), strict=True)
        )

    def work(
        self,
        names: Sequence[str],
        parts: Mapping[str, Tensor],
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """This process's boxes of what a function makes of whole matrices.

        Args:
            names: one of `rounds`.
            parts: this process's boxes; a matrix of which it holds nothing may be left out.
            function: of a whole matrix to another of its shape and dtype.
            dtype: that the matrices are sent and worked on in.
        """
        if self.group is None:
            return {name: function(part.to(dtype)) for name, part in parts.items()}
        # what goes to each process, which works on the matrix of its number, and what comes from each
        idle = [0] * (self.group.size() - len(names))
        sent = [self.boxes[name][self.rank].numel for name in names] + idle
        here = names[self.rank] if self.rank < len(names) else None
        boxes = self.boxes[here] if here is not None else ()
        received = [box.numel for box in boxes] or [0] * self.group.size()
        kept = [parts[name].reshape(-1).to(self.device, dtype) for name in names if name in parts]
        flat = torch.cat(kept) if kept else torch.empty(0, dtype=dtype, device=self.device)
        incoming = flat.new_empty(sum(received))
        dist.all_to_all_single(incoming, flat, received, sent, group=self.group)
        if here is not None:
            whole = incoming.new_empty(self.shapes[here])
            for box, piece in zip(boxes, torch.split(incoming, received), strict=True):
                whole[box.index] = piece.view(box.rows, box.columns)
            made = function(whole)
            incoming = torch.cat([made[box.index].reshape(-1) for box in boxes])
        back = torch.empty_like(flat)
        dist.all_to_all_single(back, incoming, sent, received, group=self.group)
        pieces = dict(zip(names, torch.split(back, sent[: len(names)]), strict=True))
        return {name: pieces[name].view(part.shape).to(part.device) for name, part in parts.items()}


def _holders(processes: Processes) -> dist.ProcessGroup | None:
    """The processes that together hold the matrices of this one; None where it holds them whole.

    Every process makes every group, as torch wants it.
    """
    layout = processes.layout
    cutting = [axis for axis in AXES if getattr(layout, axis) > 1]
    if processes.alone or not cutting:
        return None
    if len(cutting) == 1:
        return processes.group(cutting[0])
    found = None
    for pp, replica in itertools.product(range(layout.pp), range(layout.dp_replicate)):
        inner = itertools.product(*(range(getattr(layout, axis)) for axis in AXES))
        ranks = [layout.rank(Coordinates(pp, replica, *at)) for at in inner]
        group = dist.new_group(ranks)
        if processes.rank in ranks:
            set_timeout(group)
            found = group
    return found
