"""Whether a model's weights in 4 bits would lose what training changed last.

Many published models are in 4 bits already, and lie on the levels of their blocks. Whatever changes such a weight by less than
half a step, as most adapters and short trainings do, is gone when it is rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch.nn.functional as F
from torch import Tensor

from arriero.formats.gguf.tensor_types import mostly_four_bits, parse_kind
from arriero.formats.low_rank import LowRank
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.quantization.block_levels import fit_levels

# Of a matrix's norm: nearer its levels is on them (fp32 rounds by less), and further is an ordinary matrix (7 to 8 %).
ON, NEAR = 2e-5, 0.03
_SAMPLES, _ROWS, _BLOCK = 6, 64, 32


def distance_from_levels(source: ModelSource) -> float:
    """How far matrices lie from the nearest 4-bit levels, in blocks of 32, as a share of their norm: the median of a few."""
    names = [
        name for name, value in source.tensors.items() if name.startswith("model.layers.") and len(value.shape) == 2
    ]
    found = []
    for name in names[:: max(1, len(names) // _SAMPLES)]:
        rows = _loaded(source.tensors[name])[:_ROWS].float()
        blocks = F.pad(rows, (0, -rows.shape[1] % _BLOCK)).view(len(rows), -1, _BLOCK)
        levels, step, low = fit_levels(blocks, 4)
        missed = levels.float() * step[..., None] + low[..., None] - blocks
        found.append(float(missed.norm() / blocks.norm().clamp_min(1e-30)))
    return median(found) if found else 0.0


def nearness_warning(source: ModelSource, instead: str, gguf_kind: str | None = None) -> str | None:
    """What a user should know of a model that is rounded to 4 bits; None where there is nothing to lose.

    Args:
        instead: what keeps more of a training.
        gguf_kind: of a GGUF file, whose matrices have other bits where its blocks do not divide their rows.
    """
    if gguf_kind is not None and not mostly_four_bits(parse_kind(gguf_kind), source.config):
        return None
    distance = distance_from_levels(source)
    if not ON < distance < NEAR:
        return None
    return (
        f"the weights lie {distance:.2%} of their norm beside levels of 4 bits, as those of a 4-bit model do that was trained "
        f"on, or stored in half precision: 4 bits put them back on the levels, and what a training changed is lost. {instead}"
    )


def kept_share(source: ModelSource, written: ModelSource, updates: Mapping[str, LowRank]) -> float:
    """How much of an adapter is left in a file that was written of the sum, as a share: the median of a few matrices.

    It is the projection of what the matrix differs from the base by on what the adapter added; noise counts as nothing.
    """
    names = list(updates)
    found = []
    for name in names[:: max(1, len(names) // _SAMPLES)]:
        added = updates[name].whole()
        base = _loaded(source.tensors[name]).float() - added
        size = float(added.square().sum())
        if size:
            found.append(float(((_loaded(written.tensors[name]).float() - base) * added).sum()) / size)
    return median(found) if found else 1.0


def _loaded(value: Tensor | LazyTensor) -> Tensor:
    return value.load() if isinstance(value, LazyTensor) else value
