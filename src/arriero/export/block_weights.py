"""Weights in blocks of few bits, in the layout of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`.

``w = (q - zero_point) * scale`` with unsigned integers q, a scale for each block of consecutive inputs, and the zero point
2^(bits - 1) where none is stored (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

A zero point is a whole number, and so a block cannot hold ``w = scale * q + low`` with any low, as ggml's Q4_1 and Q4_K
do. (The operator takes fractions, and is then 40 times slower: it dequantizes the matrix each time.) What is missing is the
same for all inputs of a block: an offset times their sum. With `BlockFormat.offsets` the sums of the input's blocks are more
inputs of the product, behind the others, and the offsets more columns of the matrix, rounded like them.

What an adapter adds, ``up @ down``, is in the product the same way: ``down x`` is more inputs, behind all others, and `up` is
more columns, in blocks of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.errors import ConfigError
from arriero.quantization import integers
from arriero.quantization.block_levels import fit_levels
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.rounding import searched_scales

BLOCK_SIZES = (16, 32, 64, 128, 256)
# Shares of a block's range that are tried for its scale and zero point.
_SHARES = {4: tuple(1.0 - 0.02 * step for step in range(16)), 8: (1.0, 0.98, 0.96)}
_NUMBERS = 2**16  # rounded at a time: they and what is made of them stay in a core's cache


@dataclass(frozen=True)
class BlockFormat:
    """How a weight matrix is stored.

    Attributes:
        bits: 4 or 8.
        block_size: consecutive inputs that share a scale; the last block of a row is filled up with zeros.
        symmetric: no zero points are stored.
        offsets: a column for each block of inputs stands behind the others; not if symmetric.

    Raises:
        ConfigError: for another number of bits, or a block size that the operators do not have.
    """

    bits: int
    block_size: int = 32
    symmetric: bool = True
    offsets: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights of {self.bits} bits are not supported: 4 or 8")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"blocks of {self.block_size} are not supported: choose one of {', '.join(map(str, BLOCK_SIZES))}"
            )

    def blocks(self, in_features: int) -> int:
        """Of a row, without those of the offsets."""
        return -(-in_features // self.block_size)

    def columns(self, in_features: int, rank: int = 0) -> int:
        """Inputs of the product: with what fills up the last block, and the sums of the blocks, if there are offsets.

        Args:
            rank: of an adapter whose factors stand behind, from the beginning of a block.
        """
        blocks = self.blocks(in_features)
        count = blocks * self.block_size + blocks if self.offsets else in_features
        return self.blocks(count) * self.block_size + rank if rank else count

    @property
    def wide(self) -> BlockFormat:
        """The same with 8 bits, which need no offsets."""
        return BlockFormat(8, self.block_size)

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "with zero points and offsets" if self.offsets else "with zero points"
        return f"int{self.bits}, {kind}, blocks of {self.block_size}"


@dataclass(frozen=True)
class BlockWeight:
    """A stored matrix (out, in).

    Attributes:
        format: of the blocks.
        in_features: without what fills up the last block, and without the sums of blocks.
        packed: (out, blocks, block_size * bits / 8) uint8; of 4 bits the first of a byte's two in its low half. The blocks of
            offsets come last, here and in what follows.
        scales: (out, blocks) fp32.
        zero_points: (out, ceil(blocks * bits / 8)) uint8, packed alike; None if symmetric.
        rank: of an adapter whose `up` has the last blocks.
    """

    format: BlockFormat
    in_features: int
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    rank: int = 0

    def levels(self) -> npt.NDArray[np.uint8]:
        """(out, blocks, block_size), the integers as they are stored, unsigned."""
        return _unpack(self.packed, self.format.bits)

    @property
    def columns(self) -> int:
        """Inputs of the product."""
        return self.format.columns(self.in_features, self.rank)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """(out, in), each the product of an integer and a scale in fp32, with the offset of its block; without an adapter."""
        whole = self._columns()
        if self.format.offsets:
            count = self.format.blocks(self.in_features)
            weights, offsets = np.split(whole, [count * self.format.block_size], 1)
            whole = weights + offsets[:, :count].repeat(self.format.block_size, 1)
        return whole[:, : self.in_features]

    def up(self) -> npt.NDArray[np.float32]:
        """(out, rank), of the adapter."""
        return self._columns()[:, self.columns - self.rank : self.columns]

    def _columns(self) -> npt.NDArray[np.float32]:
        """(out, blocks * block_size), as the product has them."""
        rows, blocks = self.scales.shape
        values = self.levels()
        zero: npt.NDArray[np.uint8] | int = 1 << (self.format.bits - 1)
        if self.zero_points is not None:
            zero = _unpack(self.zero_points, self.format.bits)[:, :blocks, None]
        signed = values.astype(np.float32) - np.asarray(zero, np.float32)
        whole: npt.NDArray[np.float32] = (signed * self.scales[..., None]).reshape(rows, -1)
        return whole


def with_update(weight: BlockWeight, up: Tensor) -> BlockWeight:
    """The matrix with an adapter's `up`, (out, rank), behind it, rounded around zero."""
    form = BlockFormat(weight.format.bits, weight.format.block_size)
    more = quantize(up, form)
    zeros = weight.zero_points
    if zeros is not None:
        blocks = weight.scales.shape[1]
        before = _unpack(zeros, form.bits)[:, :blocks]
        middle = np.full((len(before), more.scales.shape[1]), 1 << (form.bits - 1), np.uint8)
        both = np.concatenate((before, middle), 1)
        zeros = _pack(np.pad(both, ((0, 0), (0, both.shape[1] % 2 if form.bits == 4 else 0))), form.bits)
    return BlockWeight(
        weight.format,
        weight.in_features,
        np.concatenate((weight.packed, more.packed), 1),
        np.concatenate((weight.scales, more.scales), 1),
        zeros,
        up.shape[1],
    )


def stack(parts: Sequence[BlockWeight]) -> BlockWeight:
    """Matrices of the same inputs as one, their rows one after the other."""
    first = parts[0]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return BlockWeight(
        first.format,
        first.in_features,
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def quantize(weight: Tensor, form: BlockFormat) -> BlockWeight:
    """Round to nearest; each block's scale (and zero point) is the one of the least squared error among those tried.

    Args:
        weight: (out, in), of any floating-point dtype.
    """
    rows_at_once = max(1, _NUMBERS // weight.shape[1])
    parts = [_quantize(rows.float(), form) for rows in torch.split(weight, rows_at_once)]
    return stack(parts) if len(parts) > 1 else parts[0]


def _quantize(weight: Tensor, form: BlockFormat) -> BlockWeight:
    in_features = weight.shape[1]
    filled = F.pad(weight, (0, -in_features % form.block_size))
    if form.symmetric:
        scheme = IntegerScheme(form.bits, form.block_size)
        scales = _signed_scales(filled, scheme)
        return from_integers(integers.quantize(filled, scales, scheme), scales, form, in_features)
    blocks = filled.view(len(weight), -1, form.block_size)
    unsigned, scales, zeros = (_with_offsets if form.offsets else _with_zero_points)(blocks, form.bits)
    packed_zeros = _pack(np.pad(zeros.numpy(), ((0, 0), (0, zeros.shape[1] % 2 if form.bits == 4 else 0))), form.bits)
    return BlockWeight(form, in_features, _pack(unsigned.numpy(), form.bits), scales.numpy(), packed_zeros)


def _with_offsets(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, blocks, size) -> unsigned integers, scales and zero points, those of the offsets last."""
    found, offsets = _offset_blocks(blocks, *fit_levels(blocks, bits)[1:], bits)
    # A block far from zero has an offset of many steps, which leaves few levels for the others of its row.
    far = (offsets.abs() > 0.51 * found[1][:, : blocks.shape[1]]).any(1).nonzero().flatten()
    if len(far):
        own = blocks[far]
        _, scales, low = fit_levels(F.pad(own, (0, 1)), bits)  # zero is in its range
        near, _ = _offset_blocks(own, scales, low, bits)
        errors = [_error(own, *parts) for parts in (near, tuple(part[far] for part in found))]
        better = errors[0] < errors[1]
        for kept, new in zip(found, near, strict=True):
            kept[far[better]] = new[better]
    return found


def _offset_blocks(
    blocks: Tensor, scales: Tensor, low: Tensor, bits: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """What `_with_offsets` returns, for levels of these steps and lows; and the offsets (out, blocks)."""
    rows, count, size = blocks.shape
    top = (1 << bits) - 1
    zeros = torch.round(-low / scales).clamp_(0, top)
    offsets = low + zeros * scales
    scheme, middle = IntegerScheme(bits, size), 1 << (bits - 1)
    filled = F.pad(offsets, (0, -count % size))
    own = _signed_scales(filled, scheme)
    signed = integers.quantize(filled, own, scheme)
    rounded = signed.to(torch.int16) + middle
    # to the levels as they are stored: else what an offset lost would be the same error in all weights of a block
    low = integers.dequantize(signed, own)[:, :count] - zeros * scales
    unsigned = torch.round((blocks - low[..., None]) / scales[..., None]).clamp_(0, top)
    parts = (
        torch.cat((unsigned.to(torch.uint8), rounded.to(torch.uint8).view(rows, -1, size)), 1),
        torch.cat((scales, own), 1),
        torch.cat((zeros.to(torch.uint8), torch.full_like(own, middle, dtype=torch.uint8)), 1),
    )
    return parts, offsets


def _error(blocks: Tensor, unsigned: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The squared error of each row."""
    rows, count, _ = blocks.shape
    values = (unsigned.float() - zeros[..., None].float()) * scales[..., None]
    offsets = values[:, count:].reshape(rows, -1)[:, :count, None]
    return (values[:, :count] + offsets - blocks).square_().sum((1, 2))


def _signed_scales(weight: Tensor, scheme: IntegerScheme) -> Tensor:
    """(out, groups); of 4 bits some are negative, since integers reach one further below zero than above."""
    scales = searched_scales(weight, scheme, torch.float32)
    if scheme.bits == 8:
        return scales
    turned = -searched_scales(-weight, scheme, torch.float32)
    errors = []
    for tried in (scales, turned):
        rounded = integers.dequantize(integers.quantize(weight, tried, scheme), tried)
        errors.append((rounded - weight).square_().view(*scales.shape, -1).sum(-1))
    return torch.where(errors[1] < errors[0], turned, scales)


def _with_zero_points(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, blocks, size) -> unsigned integers, scales and zero points; zero itself is always stored exactly."""
    top = (1 << bits) - 1
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    chosen_scale, chosen_zero = torch.ones_like(low), torch.zeros_like(low)
    for share in _SHARES[bits]:
        scale = (high - low) * (share / top)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-low * share / scale).clamp(0, top)
        rounded = torch.clamp(torch.round(blocks / scale[..., None]) + zero[..., None], 0, top)
        error = ((rounded - zero[..., None]) * scale[..., None] - blocks).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen_scale, chosen_zero = torch.where(better, scale, chosen_scale), torch.where(better, zero, chosen_zero)
    rounded = torch.round(blocks / chosen_scale[..., None]) + chosen_zero[..., None]
    return rounded.clamp(0, top).to(torch.uint8), chosen_scale, chosen_zero.to(torch.uint8)


def from_integers(values: Tensor, scales: Tensor, form: BlockFormat, in_features: int | None = None) -> BlockWeight:
    """The stored form of signed integers and their scales, which stay what they are.

    Args:
        values: (out, in) int8; `in` is a multiple of the block size, or rows are filled up with zeros.
        scales: (out, groups), a group being a multiple of a block.
        in_features: where `values` is filled up already.

    Raises:
        ConfigError: if a block would hold parts of two groups.
    """
    rows, columns = values.shape
    group = columns // scales.shape[1]
    if scales.shape[1] > 1 and group % form.block_size:
        fits = max((size for size in BLOCK_SIZES if group % size == 0), default=None)
        other = "" if fits is None else f"--format onnx with --block_size {fits}, or "
        raise ConfigError(
            f"weights with a scale for {group} inputs cannot be stored in blocks of {form.block_size}: use {other}"
            "--weights fp32, which dequantizes them"
        )
    blocks = form.blocks(columns)
    filled = F.pad(values, (0, -columns % form.block_size)).to(torch.int16) + (1 << (form.bits - 1))
    per_block = scales.float().repeat_interleave(-(-blocks // scales.shape[1]), dim=1)
    packed = _pack(filled.to(torch.uint8).view(rows, blocks, form.block_size).numpy(), form.bits)
    return BlockWeight(form, in_features or columns, packed, per_block.contiguous().numpy(), None)


def _pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """(..., n) unsigned integers -> (..., n * bits / 8)."""
    if bits == 8:
        return np.ascontiguousarray(values)
    packed: npt.NDArray[np.uint8] = values[..., 0::2] | (values[..., 1::2] << np.uint8(4))
    return packed


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    values: npt.NDArray[np.uint8] = np.stack((packed & np.uint8(0xF), packed >> np.uint8(4)), -1)
    return values.reshape(*packed.shape[:-1], -1)
