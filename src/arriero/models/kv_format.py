"""The number format in which a key-value cache holds keys and values.

In 8 bits every token's key and value of every head has a scale of its own, the largest of its magnitudes over the format's
largest number, so that

    held = round(x / scale)    and    x is read as    held * scale.

What is held of a token then depends on that token alone: an answer is the same alone and in company, in one chunk and in many,
before and after its blocks were lost. vLLM has one scale a tensor instead, which it takes from calibration data or sets to 1
(its page "Quantized KV Cache"). Keys are held as attention uses them, which is rotated (after RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.config.kv_cache import KV_CACHE_DTYPES
from arriero.errors import ConfigError

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SCALED = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_SMALLEST = torch.finfo(torch.float32).tiny
_E4M3_BIAS = 2.0**8  # of float16's exponents (15) against e4m3's (7)


@dataclass(frozen=True)
class KVFormat:
    """How a number of a key or a value is held.

    Attributes:
        dtype: what it is rounded to.
        scaled: whether a token's numbers of one head share a scale, fp32.
    """

    dtype: torch.dtype
    scaled: bool = False

    @classmethod
    def of(cls, name: str, model_dtype: torch.dtype) -> KVFormat:
        """By its name in `KV_CACHE_DTYPES`.

        Args:
            model_dtype: what "auto" stands for.

        Raises:
            ConfigError: there is no such format.
        """
        if name == "auto":
            return cls(model_dtype)
        if name in _SCALED:
            return cls(_SCALED[name], scaled=True)
        if name not in _FLOATS:
            raise ConfigError(f"--kv_cache_dtype is {name!r}: choose one of {', '.join(KV_CACHE_DTYPES)}")
        return cls(_FLOATS[name])

    @property
    def stored(self) -> torch.dtype:
        """The type of the tensor that is in memory: int8 for the bits of fp8 numbers, for which torch lacks operations."""
        return torch.int8 if self.scaled else self.dtype

    @property
    def name(self) -> str:
        """As in `KV_CACHE_DTYPES`, or float32."""
        return next((name for name, dtype in _SCALED.items() if dtype == self.dtype), str(self.dtype).split(".")[-1])

    def bytes_of_head(self, head_dim: int) -> int:
        """What a token's key of one head takes, with its scale."""
        return head_dim * self.dtype.itemsize + self.scaled * torch.float32.itemsize

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers (..., D) as they are stored, and their scales (...) if they have such.

        Scales of numbers that are not finite are not finite either, so that this does not get lost.
        """
        if not self.scaled:
            return x.to(self.dtype), None
        numbers = x.float()
        largest = 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max
        scales = numbers.abs().amax(dim=-1).div_(largest)
        codes = numbers / scales.clamp_min(_SMALLEST)[..., None]
        if self.dtype == torch.int8:
            return codes.round_().to(torch.int8), scales
        return codes.to(self.dtype).view(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers that `encode` made these of, as nearly as they are held: (..., D) of `dtype`; perhaps `codes` itself."""
        if scales is None:
            return codes.to(dtype)
        scales = scales[..., None]
        if self.dtype == torch.int8:
            return codes.float().mul_(scales).to(dtype)
        if codes.device.type != "cpu":
            return codes.view(self.dtype).float().mul_(scales).to(dtype)
        # Many times faster than torch's own conversion on a CPU: e4m3's bits are float16's without the lowest of its mantissa,
        # the exponent counted from another number. Its NaN becomes a number here, which a scale that is no number undoes.
        bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # the sign went to bit 14 too
        return bits.view(torch.float16).float().mul_(scales * _E4M3_BIAS).to(dtype)
