"""Where the parameters that this process holds lie in those of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from arriero.formats.parts import Placement
from arriero.models.tensor_split import Cut, chunk


def local_tensor(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, as a plain tensor of the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return parameter.to_local()


def local_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each parameter, by name."""
    return {name: local_tensor(parameter) for name, parameter in _held_parameters(model)}


def _held_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as they are between steps: a forward pass may have left some of them gathered."""
    parallel = getattr(model, "parallel", None)
    for stage in parallel.stages if parallel is not None else ():
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return model.named_parameters()


def placements(model: nn.Module) -> dict[str, Placement]:
    """Where each of `local_tensors` lies; in a lone process each is whole.

    `arriero.parallel.parallelize` leaves what it did in `model.parallel`.
    """
    parallel = getattr(model, "parallel", None)
    if parallel is None:
        return {name: Placement.whole(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    found = {}
    for name, parameter in _held_parameters(model):
        shape = parallel.shapes[name]
        if name in parallel.everywhere:
            whole = Placement.whole(shape)
            found[name] = replace(whole, copies=parallel.processes.size, writes=parallel.processes.first)
            continue
        cut = parallel.tensor.cuts.get(name) if parallel.tensor is not None else None
        outer = Placement.whole(shape) if cut is None else _cut_placement(shape, cut)
        placement = _shard_placement(parameter).within(outer)
        ends = parallel.tied.get(name)
        if ends is not None:  # the embedding at one end of the pipeline and its copy, the head, at the other
            placement = replace(
                placement,
                copies=2 * placement.copies,
                writes=placement.writes and name == ends,
                stored_as=None if name == ends else ends,
            )
        found[name] = placement
    return found


def _cut_placement(shape: tuple[int, ...], cut: Cut) -> Placement:
    offset, size = [0] * len(shape), list(shape)
    if cut.dim is not None:
        offset[cut.dim], size[cut.dim] = cut.start, cut.size
    return Placement(shape, tuple(offset), tuple(size), cut.copies, cut.copy == 0)


def _shard_placement(parameter: Tensor) -> Placement:
    """Where the local tensor lies in the parameter that FSDP shared out."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Placement.whole(shape)
    mesh, offset, size, copies, writes = parameter.device_mesh, 0, shape[0], 1, True
    for axis, how in enumerate(parameter.placements):
        count, at = mesh.size(axis), mesh.get_local_rank(axis)
        if how.is_shard():
            start, size = chunk(size, count, at)
            offset += start
        else:
            copies *= count
            writes = writes and at == 0
    return Placement(shape, (offset, *[0] * (len(shape) - 1)), (size, *shape[1:]), copies, writes)
