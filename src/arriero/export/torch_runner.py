"""What computes an engine's steps with a torch bundle: torch and the program, and none of the model's code."""

from __future__ import annotations

import torch

from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_graph import TorchGraph
from arriero.export.torch_session import (
    check_inputs,
    model_shape,
    on_device,
    open_weights,
    program_runner,
    stored_dtype,
)
from arriero.export.torch_target import target_of
from arriero.export.weight_names import EMBEDDING


def open_runner(
    bundle: Bundle, slots: int, threads: int | None = None, *, spinning: bool = True, device: str | None = None
) -> SlotRunner:
    """See `kinds.open_runner`; the number of threads, and how they wait, is that of torch in this process.

    Raises:
        FormatError: when the program is none of arriero's, or not of this model.
    """
    weights = open_weights(bundle)
    target = target_of(bundle, stored_dtype(weights), device)
    graph = TorchGraph(bundle.graph, target.device)
    (layers, heads, head_dim), vocab_size = model_shape(bundle)
    if weights[EMBEDDING].shape[0] != vocab_size:
        raise FormatError(
            f"{bundle.folder}: its configuration tells of {vocab_size} tokens, and its weights are of "
            f"{weights[EMBEDDING].shape[0]}; export the model again"
        )
    integers = [((None,) * dims, torch.int64) for dims in (2, 1, 1, 1)]
    matrices = [(tuple(value.shape), value.dtype) for value in weights.values()]
    cache = ((None, 2 * heads, target.room(bundle.manifest.context), head_dim), target.dtype)
    found = list(zip(graph.shapes, graph.dtypes, strict=True))
    layers = min(layers, len(found))  # whatever the manifest says: as many inputs would fill the memory
    check_inputs(bundle.graph, found, [*integers, *matrices, *[cache] * layers])
    weights = on_device(bundle, weights, target)
    return program_runner(bundle, graph, {}, weights, slots, threads, target, captured=True)
