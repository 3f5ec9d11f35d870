"""The weights of an exported program: an HF folder's, with those of one input joined."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arriero.export.torch_program import FREQUENCIES
from arriero.export.weight_source import WeightSource
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig
from arriero.models.rope import rope_frequencies
from arriero.models.weight_shapes import weight_shapes

# Of a layer: what is one matrix in a program, of what is several in an HF folder.
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def weight_parts(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """The names of a program's weights, and those of an HF folder that each is made of, in the order of the names."""
    joined = {part: (name, parts) for name, parts in JOINED.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for stored in weight_shapes(config):
        layer, _, kind = stored.rpartition(".")
        prefix, _, module = layer.rpartition(".")
        parent, _, group = prefix.rpartition(".")
        name, parts = joined.get(f"{group}.{module}", ("", ()))
        if name:
            found[f"{parent}.{name}.{kind}"] = tuple(f"{parent}.{part}.{kind}" for part in parts)
        else:
            found[stored] = (stored,)
    return dict(sorted(found.items()))


def program_weights(source: WeightSource, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The weights of a program, each made when it is asked for, in the order of a program's inputs.

    Args:
        dtype: of matrices; vectors are fp32.
    """
    shapes = weight_shapes(source.config)
    found = {}
    for name, parts in weight_parts(source.config).items():
        shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        kind = dtype if len(shape) == 2 else torch.float32
        found[name] = LazyTensor(shape, kind, partial(_joined, source, parts, kind))
    frequencies = rope_frequencies(source.config)[0]
    found[FREQUENCIES] = LazyTensor(tuple(frequencies.shape), torch.float32, lambda: frequencies)
    return dict(sorted(found.items()))


def _joined(source: WeightSource, parts: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    return source.rows(parts).to(dtype)
