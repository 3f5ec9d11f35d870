"""LLaMA 3.1's RoPE scaling in GGUF files, which have a divisor for each frequency and not the four numbers it comes from.

Formula: `LlamaModel.generate_extra_tensors` of llama.cpp's converter. The published models differ in two of the numbers
only, and those are found again from the divisors. Where they do not tell all four, keys of ours beside them do; llama.cpp
reads the divisors and leaves the keys alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.formats.gguf.container import Value
from arriero.models.config import LlamaConfig

Numbers = NDArray[np.float64]

_PREFIX = "arriero.rope.llama3."
_PARTS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_PUBLISHED_LOW, _PUBLISHED_HIGH, _PUBLISHED_CONTEXT = 1.0, 4.0, 8192
_TOLERANCE = 1e-4  # of a divisor: files may hold it in half precision


def rope_divisors(config: LlamaConfig) -> Tensor | None:
    """The divisors of the frequencies (head_dim/2,) fp32: the tensor `rope_freqs.weight`; None for every other scaling."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    return torch.from_numpy(_divisors(scaling, config.rope_theta, config.head_dim)).float()


def own_keys(config: LlamaConfig) -> dict[str, Value]:
    """The keys to write beside the divisors: none where they tell the scaling by themselves."""
    divisors, scaling = rope_divisors(config), config.rope_scaling
    if divisors is None or scaling is None:
        return {}
    told = scaling_of(divisors.numpy(), config.rope_theta, config.head_dim, {})
    if told is not None and all(told[part] == scaling[part] for part in _PARTS):
        return {}
    keys: dict[str, Value] = {_PREFIX + part: float(scaling[part]) for part in _PARTS}
    context = float(scaling[_PARTS[3]])
    return keys | ({_PREFIX + _PARTS[3]: int(context)} if context.is_integer() else {})


def scaling_of(
    divisors: NDArray[Any], theta: float, head_dim: int, metadata: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The scaling that these divisors come from, as a configuration has it; None if they come from none that is known.

    Args:
        divisors: as they are stored.
        metadata: of the file; keys of ours in it are believed where they give the divisors.
    """
    stored = divisors.astype(np.float64).ravel()
    if stored.size != head_dim // 2 or not np.isfinite(stored).all() or stored.max() < 1.0:
        return None
    for scaling in (_of_keys(metadata), _of_divisors(stored, theta, head_dim)):
        if scaling is not None and np.allclose(_divisors(scaling, theta, head_dim), stored, rtol=_TOLERANCE, atol=0):
            return scaling
    return None


def _of_keys(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] = {"rope_type": "llama3"}
    for part in _PARTS:
        value = metadata.get(_PREFIX + part)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return None
        found[part] = _short(value) if isinstance(value, float) else value
    if found["high_freq_factor"] <= found["low_freq_factor"]:
        return None
    return found


def _of_divisors(stored: Numbers, theta: float, head_dim: int) -> dict[str, Any]:
    """With the bounds of the published models: the factor is the largest divisor, and one between 1 and it tells context."""
    factor, context = float(stored.max()), float(_PUBLISHED_CONTEXT)
    between = np.flatnonzero((stored > 1 + _TOLERANCE) & (stored < factor * (1 - _TOLERANCE)))
    if between.size:
        at = between[len(between) // 2]
        smooth = (1 / stored[at] - 1 / factor) / (1 - 1 / factor)
        turns = _PUBLISHED_LOW + smooth * (_PUBLISHED_HIGH - _PUBLISHED_LOW)
        context = float(turns * _wavelengths(theta, head_dim)[at])
    return {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": _PUBLISHED_LOW,
        "high_freq_factor": _PUBLISHED_HIGH,
        "original_max_position_embeddings": max(1, round(context)),
    }


def _divisors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Numbers:
    factor, low, high, context = (float(scaling[part]) for part in _PARTS)
    with np.errstate(all="ignore"):  # a file's numbers may be any
        smooth = np.clip((context / _wavelengths(theta, head_dim) - low) / (high - low), 0.0, 1.0)
        return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _wavelengths(theta: float, head_dim: int) -> Numbers:
    exponents = (
        torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    )  # in fp32, as the model and the converter do
    return np.asarray(2 * math.pi / (1.0 / theta**exponents).double().numpy())


def _short(value: float) -> float:
    """The file has fp32: its shortest form is what the model's own config.json says."""
    return float(str(np.float32(value)))
