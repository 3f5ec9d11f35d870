"""How the weights of a linear layer are stored in few bits, and read back.

A scheme says which tensors stand for a weight matrix, makes them of it, and makes the matrix of them. Every tensor is laid
out by rows (output channels), so that a run of rows, or of columns where groups allow it, is a layer of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.quantization import integers, nf4
from arriero.quantization.integers import IntegerScheme, storable

# name -> shape and dtype
TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


@dataclass(frozen=True)
class Activation:
    """How the inputs of a linear layer are rounded before it: to integers in [-128, 127] times a scale.

    Attributes:
        dynamic: whether each token's scale comes from its own greatest magnitude (divided by 127.5); else one scale for all
            is stored as `input_scale`, (1,).
    """

    dynamic: bool = False


class WeightScheme(ABC):
    """One way to store a weight matrix (out, in)."""

    activation: Activation | None = None

    @property
    @abstractmethod
    def column_unit(self) -> int:
        """A run of columns is stored apart from the others if it begins and ends at multiples of this."""

    @property
    @abstractmethod
    def weight_names(self) -> tuple[str, ...]:
        """Names of the tensors that stand for a weight."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """`weight_names`, and the scale of the activations if that is stored."""
        stored = self.activation is not None and not self.activation.dynamic
        return (*self.weight_names, "input_scale") if stored else self.weight_names

    @abstractmethod
    def weight_tensors(self, out_features: int, in_features: int) -> TensorShapes:
        """Names, shapes and dtypes of the tensors that stand for a weight.

        Raises:
            ConfigError: if a layer of this size cannot be stored so.
        """

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The nearest stored form of a weight (out, in), by the plain rule of the format (no search)."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in); the product of integer and scale is formed in fp32 and rounded once to `dtype`."""

    def tensors(self, out_features: int, in_features: int) -> TensorShapes:
        """The same for all of `tensor_names`."""
        found = self.weight_tensors(out_features, in_features)
        if "input_scale" in self.tensor_names:
            found["input_scale"] = ((1,), torch.float32)
        return found


@dataclass(frozen=True)
class IntegerWeights(WeightScheme):
    """Integers times a scale for each output channel or group of its inputs.

    Attributes:
        integer: bits and group size.
        scale_dtype: of the stored scales. Integers are made with the scales as they are stored.
        activation: None for weights only.
        packed: 8 / bits integers a byte, in an int32 tensor `weight_packed` (the first integer in the lowest bits, each
            plus 2^(bits - 1)); else one a byte, in an int8 tensor `weight`.
    """

    integer: IntegerScheme
    scale_dtype: torch.dtype = torch.float32
    activation: Activation | None = None
    packed: bool = True

    @property
    def column_unit(self) -> int:
        word = 32 // self.integer.bits if self.packed else 1
        return math.lcm(word, self.integer.group_size or 1)

    @property
    def weight_names(self) -> tuple[str, ...]:
        return ("weight_packed" if self.packed else "weight", "weight_scale")

    def weight_tensors(self, out_features: int, in_features: int) -> TensorShapes:
        groups = self.integer.groups(in_features)
        scales = {"weight_scale": ((out_features, groups), self.scale_dtype)}
        if not self.packed:
            return {"weight": ((out_features, in_features), torch.int8), **scales}
        in_word = 32 // self.integer.bits
        if in_features % in_word:
            raise ConfigError(
                f"a layer of {in_features} inputs cannot be packed in {self.integer.bits} bits: a multiple of {in_word} "
                "is needed"
            )
        return {"weight_packed": ((out_features, in_features // in_word), torch.int32), **scales}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.store(weight, integers.absmax_scales(weight.float(), self.integer))

    def store(self, weight: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The stored form of a weight (out, in) rounded with given scales (out, groups)."""
        scales = storable(scales, self.scale_dtype)
        return self.pack(integers.quantize(weight.float(), scales.float(), self.integer), scales)

    def pack(self, values: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The stored form of integers (out, in) int8 and their scales (out, groups)."""
        stored = {"weight_scale": storable(scales, self.scale_dtype)}
        if not self.packed:
            return {"weight": values, **stored}
        return {"weight_packed": pack_integers(values, self.integer.bits), **stored}

    def integers(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(out, in) int8."""
        return unpack_integers(tensors["weight_packed"], self.integer.bits) if self.packed else tensors["weight"]

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return integers.dequantize(self.integers(tensors), tensors["weight_scale"].float()).to(dtype)

    def __str__(self) -> str:
        size = self.integer.group_size
        groups = "a scale for each output channel" if size is None else f"groups of {size}"
        if self.activation is not None:
            groups += f", inputs of 8 bits, {'a scale for each token' if self.activation.dynamic else 'one scale'}"
        return f"weights of {self.integer.bits} bits, {groups}"


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """(out, in) int8 -> (out, in * bits / 32) int32; the inverse of `unpack_integers`."""
    unsigned = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """(out, words) int32 -> (out, words * 32 / bits) int8, in [-2^(bits - 1), 2^(bits - 1))."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    return torch.stack((unsigned & 0xF, unsigned >> 4), -1).flatten(-2).view(torch.int8) - 8


@dataclass(frozen=True)
class Fp8Weights(WeightScheme):
    """8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa) times a scale for each output channel.

    Attributes:
        scale_dtype: of the stored scales.
    """

    scale_dtype: torch.dtype = torch.float32

    @property
    def column_unit(self) -> int:
        return 1

    @property
    def weight_names(self) -> tuple[str, ...]:
        return ("weight", "weight_scale")

    def weight_tensors(self, out_features: int, in_features: int) -> TensorShapes:
        return {
            "weight": ((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": ((out_features, 1), self.scale_dtype),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        greatest = weight.float().abs().amax(-1, keepdim=True)
        return self.store(weight, torch.where(greatest > 0, greatest / FP8_MAX, torch.ones_like(greatest)))

    def store(self, weight: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The stored form of a weight (out, in) rounded with given scales (out, 1)."""
        scales = storable(scales, self.scale_dtype)
        scaled = (weight.float() / scales.float()).clamp(-FP8_MAX, FP8_MAX)
        return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scales}

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"].float()).to(dtype)

    def __str__(self) -> str:
        return "weights in fp8 (e4m3), a scale for each output channel"


@dataclass(frozen=True)
class Nf4Weights(WeightScheme):
    """NormalFloat of 4 bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3): see `arriero.quantization.nf4`.

    Attributes:
        block_size: consecutive inputs that share their greatest magnitude.
    """

    block_size: int = 64

    @property
    def column_unit(self) -> int:
        return self.block_size

    @property
    def weight_names(self) -> tuple[str, ...]:
        return ("weight", "weight_absmax")

    def weight_tensors(self, out_features: int, in_features: int) -> TensorShapes:
        if in_features % self.block_size:
            raise ConfigError(
                f"nf4 blocks of {self.block_size} do not divide the {in_features} inputs of a layer: "
                "use int8 (--quantize_base int8, --quant_type int8), or of quantize a --group_size that does"
            )
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "weight_absmax": ((out_features, in_features // self.block_size), torch.float32),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        packed, absmax = nf4.quantize(weight.float(), self.block_size)
        return {"weight": packed, "weight_absmax": absmax}

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return nf4.dequantize(tensors["weight"], tensors["weight_absmax"]).to(dtype)

    def __str__(self) -> str:
        return f"weights in nf4, blocks of {self.block_size}"
