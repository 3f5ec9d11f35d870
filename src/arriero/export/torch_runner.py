"""What computes an engine's steps with a torch bundle: torch and the program, and none of the model's code."""

from __future__ import annotations

import torch

from arriero.export.bundle import Bundle
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_graph import TorchGraph
from arriero.export.torch_session import check_inputs, model_shape, open_weights, program_runner


def open_runner(bundle: Bundle, slots: int, threads: int | None = None, *, spinning: bool = True) -> SlotRunner:
    """See `kinds.open_runner`; the number of threads, and how they wait, is that of torch in this process.

    Raises:
        FormatError: when the program is none of arriero's, or not of this model.
    """
    graph, weights = TorchGraph(bundle.graph), open_weights(bundle)
    (layers, heads, head_dim), _ = model_shape(bundle)
    integers = [((None,) * dims, torch.int64) for dims in (2, 1, 1, 1)]
    matrices = [(tuple(value.shape), value.dtype) for value in weights.values()]
    cache = ((None, 2 * heads, bundle.manifest.context, head_dim), torch.float32)
    found = list(zip(graph.shapes, graph.dtypes, strict=True))
    check_inputs(bundle.graph, found, [*integers, *matrices, *[cache] * layers])
    return program_runner(bundle, graph, {}, weights, slots, threads)
