"""The weights of an exported program: an HF folder's, with those of one input joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from arriero.export.integer_tiles import levels_of, tile_shapes, tiles
from arriero.export.torch_program import DOWN, FREQUENCIES, UP
from arriero.export.weight_names import EMBEDDING
from arriero.export.weight_source import WeightSource
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig
from arriero.models.rope import rope_frequencies
from arriero.models.weight_shapes import HEAD, weight_shapes

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


_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class MatrixForm:
    """How the matrices of a program are stored.

    Attributes:
        dtype: of them.
        bits: 8 or 4, where they are levels (`integer_tiles`); None: numbers of the dtype.
        head_bits: the same of the output head and the embedding.
    """

    dtype: torch.dtype = torch.float32
    bits: int | None = None
    head_bits: int = 8

    @property
    def name(self) -> str:
        """As `--weights` has it."""
        return _NAMES[self.dtype] if self.bits is None else f"int{self.bits}"

    def bits_of(self, name: str) -> int | None:
        """Of a matrix."""
        return self.head_bits if self.bits is not None and name in (EMBEDDING, HEAD) else self.bits


def program_weights(source: WeightSource, form: MatrixForm) -> dict[str, LazyTensor]:
    """The weights of a program, each made when it is asked for, in the order of a program's inputs.

    Of a matrix of levels there are three, see `integer_tiles`; and the factors of what an adapter adds to one of 4 bits.
    Vectors are fp32.
    """
    shapes = weight_shapes(source.config)
    found: dict[str, LazyTensor] = {}
    for name, parts in weight_parts(source.config).items():
        shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        bits = form.bits_of(name) if len(shape) == 2 else None
        if bits is not None:
            bits = 8 if source.wider(parts) else bits
            found |= _tiled(source, name, parts, bits, (shape[0], shape[1]))
            update = source.update(parts) if bits == 4 else None
            if update is not None:
                for part, value in ((UP, update.up.t().contiguous()), (DOWN, update.down)):
                    found[f"{name}.{part}"] = LazyTensor(tuple(value.shape), value.dtype, partial(_given, value))
            continue
        kind = form.dtype if len(shape) == 2 else torch.float32
        found[name] = LazyTensor(shape, kind, partial(_joined, source, parts, kind))
    frequencies = rope_frequencies(source.config)[0]
    found[FREQUENCIES] = LazyTensor(tuple(frequencies.shape), torch.float32, lambda: frequencies)
    return dict(sorted(found.items()))


def _tiled(
    source: WeightSource, name: str, parts: Sequence[str], bits: int, shape: tuple[int, int]
) -> dict[str, LazyTensor]:
    """The parts of a matrix, which is rounded once for all of them that are asked for one after the other."""

    @lru_cache(maxsize=1)
    def made() -> dict[str, Tensor]:
        return tiles(levels_of(source, parts, bits))

    def load(part: str) -> Tensor:
        value = made()[part]
        if part == max(own):  # the last
            made.cache_clear()
        return value

    own = tile_shapes(*shape, bits)
    return {f"{name}.{part}": LazyTensor(size, dtype, partial(load, part)) for part, (size, dtype) in own.items()}


def _given(value: Tensor) -> Tensor:
    return value


def _joined(source: WeightSource, parts: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    return source.rows(parts).to(dtype)
