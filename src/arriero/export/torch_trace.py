"""Exported programs of a model: traced with fake tensors, so that neither weights nor memory are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx.experimental._config as tracing
from torch import Tensor
from torch._dynamo.exc import UserError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.nn.attention import sdpa_kernel

from arriero.errors import ConfigError
from arriero.export.torch_program import DecodeProgram, RowsProgram, StepProgram
from arriero.export.torch_target import CPU, Target
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig

# Of a traced dimension's size, where nothing else bounds it.
MAX_ROWS, MAX_WANTED = 4096, 2**20


def trace_step(
    config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor], target: Target = CPU
) -> ExportedProgram:
    """`StepProgram` for any number of sequences, tokens and wanted logits.

    Args:
        weights: as `program_weights` gives them.
    """
    rows, size, wanted = 3, 5, 4  # any that are not alike
    length, room = 7 if target.unit == 1 else 2 * target.unit, target.room(context)
    with FakeTensorMode(), target.device:
        example = (
            _integers(rows, size),
            _integers(rows),
            _integers(length),
            _integers(wanted),
            _empty(weights),
            [_cache(config, room, rows, target.dtype) for _ in range(config.num_hidden_layers)],
        )
    batch, length_dim = Dim("batch", min=1, max=MAX_ROWS), Dim("length", min=1, max=room // target.unit)
    shapes = (
        {0: batch, 1: Dim("tokens", min=1, max=context)},
        {0: batch},
        {0: length_dim if target.unit == 1 else target.unit * length_dim},
        {0: Dim("wanted", min=1, max=MAX_WANTED)},
        dict.fromkeys(weights),
        [{0: batch}] * config.num_hidden_layers,
    )
    return _trace(StepProgram(config, target), example, shapes, target)


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


def trace_rows(config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor]) -> ExportedProgram:
    """`RowsProgram` for any number of sequences."""
    layers, rows = range(config.num_hidden_layers), 3
    with FakeTensorMode():
        example = (_integers(rows), _integers(rows), _empty(weights), [_cache(config, context, rows) for _ in layers])
    batch = Dim("batch", min=1, max=MAX_ROWS)
    shapes = ({0: batch}, {0: batch}, dict.fromkeys(weights), [{0: batch} for _ in layers])
    return _trace(RowsProgram(config), example, shapes)


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _empty(weights: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in weights.items()}


def _cache(config: LlamaConfig, room: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, 2 * config.num_key_value_heads, room, config.head_dim, dtype=dtype)


def _trace(program: torch.nn.Module, example: tuple[Any, ...], shapes: Any, target: Target = CPU) -> ExportedProgram:
    # Without the patch a dimension that may be 1 would be refused: nothing here treats a size of 1 in another way.
    with torch.no_grad(), tracing.patch(backed_size_oblivious=True), sdpa_kernel(target.kernels):  # type: ignore[attr-defined]
        try:
            traced = torch.export.export(program, example, dynamic_shapes=shapes)
        except UserError as error:  # torch 2.11, of programs for a CPU
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"torch {torch.__version__} cannot trace the model for open sizes ({reason}): use torch 2.13 or newer, or "
                "--format onnx"
            ) from error
    for node in traced.graph.nodes:  # names of files of this machine
        node.meta.pop("stack_trace", None)
    return traced
