"""Exported programs of a model: traced with fake tensors, so that neither weights nor memory are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx.experimental._config as tracing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from arriero.export.torch_program import DecodeProgram, StepProgram
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig

# Of a traced dimension's size, where nothing else bounds it.
MAX_ROWS, MAX_WANTED = 4096, 2**20


def trace_step(config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor]) -> ExportedProgram:
    """`StepProgram` for any number of sequences, tokens and wanted logits.

    Args:
        weights: as `program_weights` gives them.
    """
    rows, size, length, wanted = 3, 5, 7, 4  # any that are not alike
    with FakeTensorMode():
        example = (
            _integers(rows, size),
            _integers(rows),
            _integers(length),
            _integers(wanted),
            _empty(weights),
            [_cache(config, context, rows) for _ in range(config.num_hidden_layers)],
        )
    batch = Dim("batch", min=1, max=MAX_ROWS)
    shapes = (
        {0: batch, 1: Dim("tokens", min=1, max=context)},
        {0: batch},
        {0: Dim("length", min=1, max=context)},
        {0: Dim("wanted", min=1, max=MAX_WANTED)},
        dict.fromkeys(weights),
        [{0: batch}] * config.num_hidden_layers,
    )
    return _trace(StepProgram(config), example, shapes)


def trace_decode(config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor], rows: int) -> ExportedProgram:
    """`DecodeProgram` for this number of sequences of any lengths."""
    layers = range(config.num_hidden_layers)
    with FakeTensorMode():
        example = (
            _integers(rows),
            _integers(rows),
            [_integers(5 + row) for row in range(rows)],
            _empty(weights),
            [[_cache(config, context, 1)[0] for _ in layers] for _ in range(rows)],
        )
    shapes = (
        None,
        None,
        [{0: Dim(f"length_{row}", min=1, max=context)} for row in range(rows)],
        dict.fromkeys(weights),
        [[None for _ in layers] for _ in range(rows)],
    )
    return _trace(DecodeProgram(config, rows), example, shapes)


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _empty(weights: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in weights.items()}


def _cache(config: LlamaConfig, context: int, rows: int) -> Tensor:
    return torch.empty(rows, 2 * config.num_key_value_heads, context, config.head_dim)


def _trace(program: torch.nn.Module, example: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    # Without it a dimension that may be 1 would be refused: nothing here treats a size of 1 in another way.
    with torch.no_grad(), tracing.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        traced = torch.export.export(program, example, dynamic_shapes=shapes)
    for node in traced.graph.nodes:  # names of files of this machine
        node.meta.pop("stack_trace", None)
    return traced
