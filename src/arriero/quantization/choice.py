"""From the name of a quantization to its scheme."""

from __future__ import annotations

import torch

from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.linear import linear_layers
from arriero.quantization.schemes import Activation, Fp8Weights, IntegerWeights, Nf4Weights, WeightScheme

_INT4_GROUPS, _NF4_BLOCKS = (128, 64, 32), (64, 32)
# Those that bitsandbytes (0.50) can compute with; others have no program that reads them.
NF4_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def scheme_for(
    kind: str,
    config: LlamaConfig,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    static: bool = False,
) -> WeightScheme:
    """The scheme of a model's linear layers.

    Args:
        kind: int8, int4, nf4, fp8 or a8w8.
        group_size: -1 for a whole output channel, which nf4 does not have; None chooses what suits the model.
        static: of a8w8, whether the range of activations is stored.

    Raises:
        ConfigError: if a layer's inputs do not divide into groups, or for blocks that nf4 does not come in.
    """
    inputs = {shape[1] for shape in linear_layers(config).values()}
    scheme: WeightScheme
    if kind == "fp8":
        scheme = Fp8Weights(scale_dtype)
    elif kind == "nf4":
        if group_size is not None and group_size not in NF4_BLOCK_SIZES:
            sizes = ", ".join(map(str, NF4_BLOCK_SIZES))
            raise ConfigError(
                f"--group_size {group_size}: bitsandbytes has nf4 in blocks of {sizes} inputs; choose one"
            )
        scheme = Nf4Weights(group_size or _fitting(_NF4_BLOCKS, inputs) or 64)
    elif kind in ("int8", "int4", "a8w8"):
        bits = 4 if kind == "int4" else 8
        chosen = _fitting(_INT4_GROUPS, inputs) if group_size is None and bits == 4 else group_size
        integer = IntegerScheme(bits, None if chosen in (None, -1) else chosen)
        activation = Activation(dynamic=not static) if kind == "a8w8" else None
        scheme = IntegerWeights(integer, scale_dtype, activation, packed=activation is None)
    else:
        raise ConfigError(f"--quant_type {kind} is not known: int8, int4, nf4, fp8 or a8w8")
    for rows, columns in set(linear_layers(config).values()):
        scheme.tensors(rows, columns)
    return scheme


def _fitting(sizes: tuple[int, ...], inputs: set[int]) -> int | None:
    """The first size that divides all of them."""
    return next((size for size in sizes if all(count % size == 0 for count in inputs)), None)
