"""Rotary position embedding (https://arxiv.org/abs/2104.09864) in the half-split layout of HF checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from arriero.models.config import LlamaConfig


def _mscale(factor: float, multiplier: float = 1.0) -> float:
    """The growth of attention's temperature with the context (YaRN, https://arxiv.org/abs/2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _llama3_frequencies(inverse_frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend between (Llama 3.1 code, `apply_scaling`)."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse_frequencies
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    blended: Tensor = (1 - smooth) * inverse_frequencies / factor + smooth * inverse_frequencies
    return blended


def _yarn_frequencies(inverse_frequencies: Tensor, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Interpolate by part of the spectrum (YaRN, section 3.2) and the factor on cos and sin (section 3.4)."""
    half = inverse_frequencies.shape[0]
    dim = 2 * half
    context = scaling["original_max_position_embeddings"]
    factor = scaling["factor"]

    def correction_dim(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = correction_dim(scaling.get("beta_fast") or 32)
    high = correction_dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the reference code: no division by zero
    ramp = ((torch.arange(half, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    frequencies = inverse_frequencies / factor * ramp + inverse_frequencies * (1 - ramp)

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        else:
            attention_factor = _mscale(factor)
    return frequencies, float(attention_factor)


def rope_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """The inverse frequencies (head_dim/2,) fp32 on the CPU, and the factor on cos and sin (1 except for yarn).

    For dynamic NTK these are the frequencies up to `max_position_embeddings`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inverse_frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse_frequencies, 1.0
    match scaling["rope_type"]:
        case "linear":
            return inverse_frequencies / scaling["factor"], 1.0
        case "llama3":
            return _llama3_frequencies(inverse_frequencies, scaling), 1.0
        case "yarn":
            return _yarn_frequencies(inverse_frequencies, config.rope_theta, scaling)
        case _:  # dynamic
            return inverse_frequencies, 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin of each position, from fp32 inverse frequencies.

    The one buffer is not part of the state dict. It is always right: it is computed on the CPU even under
    `torch.device("meta")`, and computed anew whenever `.to(...)`, `.half()` or `.to_empty(...)` would have moved,
    rounded or dropped it.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.is_dynamic = config.rope_scaling is not None and config.rope_scaling["rope_type"] == "dynamic"
        frequencies, self.attention_factor = rope_frequencies(config)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def reset(self, device: torch.device | str | None = None) -> None:
        """Compute the buffer again, on `device` (default: where it is)."""
        frequencies, self.attention_factor = rope_frequencies(self.config)
        self.inverse_frequencies = frequencies.to(self.inverse_frequencies.device if device is None else device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset()
        return self

    @torch.no_grad()
    def forward(
        self, positions: Tensor, dtype: torch.dtype, sequence_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and signed sin for `rotate`.

        Args:
            positions: (B, S) int64.
            dtype: what the result is cast to after it is computed in fp32.
            sequence_lengths: (B, S) or (B, 1) int64, the length of the sequence that each token is of; only dynamic NTK
                uses it. Default: the greatest position of the row + 1. Unlike in transformers, the length is that of
                the own sequence, not of the longest one in the batch, so a row's result does not depend on its
                neighbours.

        Returns:
            Two tensors (B, S, 1, head_dim): cos, and sin whose first half is negated.
        """
        frequencies = self.inverse_frequencies.to(positions.device)
        if self.is_dynamic:
            if sequence_lengths is None:
                sequence_lengths = positions.amax(dim=-1, keepdim=True) + 1
            frequencies = self._dynamic_frequencies(frequencies, sequence_lengths)
        angles = positions[..., None].float() * frequencies
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)

    def _dynamic_frequencies(self, frequencies: Tensor, sequence_lengths: Tensor) -> Tensor:
        """NTK-aware base growth beyond `max_position_embeddings` (u/emozilla; `_compute_dynamic_ntk_parameters`).

        Tensor arithmetic only: no synchronisation with the device, no state that grows.
        """
        dim, limit = self.config.head_dim, self.config.max_position_embeddings
        factor = (self.config.rope_scaling or {})["factor"]
        lengths = sequence_lengths[..., None].clamp(min=limit)
        base = self.config.rope_theta * (factor * lengths / limit - (factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
        # Within the limit the exact table, not a base that went through fp32.
        return torch.where(lengths > limit, 1.0 / base**exponents, frequencies)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head.

    Args:
        x: (B, S, heads, D).
        cos, signed_sin: (B or 1, S, 1, D) from `RotaryEmbedding`.

    Returns:
        (B, S, heads, D). The sign is in the table, so that a roll and one fused multiply-add do it: the cheapest of the
        forms measured on CPU, forward and backward, and a plain graph for compile and export.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)
