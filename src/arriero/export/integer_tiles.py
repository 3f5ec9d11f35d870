"""Matrices of 8- or 4-bit levels in tiles of 16 outputs, as `native/integer_product.h` multiplies with them.

A weight is `low + step * level`, with a step and a low for each block of 32 consecutive inputs of an output. That holds a
block of 16 equal steps anywhere, and so ggml's Q4_0, Q4_1 and Q4_K, and what GPTQ or AWQ rounded, as they are.

levels      (tiles, blocks, 64 * bits) uint8: lines of 64 bytes, in which each of 16 outputs has four. Of 8 bits they are four
            consecutive inputs; of 4 bits the low halves are four inputs, and the high halves the next four.
steps       (tiles, blocks, 2, 16) fp16: steps, and behind them lows
factors     (tiles, 16) fp32, powers of two: steps and lows of an output are in units of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.export.block_weights import BlockFormat
from arriero.export.weight_source import WeightSource
from arriero.quantization.block_levels import fit_levels

BLOCK, LANES = 32, 16
LEVELS, STEPS, FACTORS = "levels", "steps", "factors"
_TOP = 2.0**14  # a quarter of fp16's largest number


@dataclass(frozen=True)
class Levels:
    """A matrix (out, in) before it lies in tiles.

    Attributes:
        values: (out, blocks, 32) uint8.
        steps, lows: (out, blocks) fp32.
        bits: of a level.
    """

    values: Tensor
    steps: Tensor
    lows: Tensor
    bits: int

    def dequantized(self, in_features: int) -> Tensor:
        """(out, in) fp64."""
        whole = self.values.double() * self.steps.double()[..., None] + self.lows.double()[..., None]
        return whole.flatten(1)[:, :in_features]


def levels_of(source: WeightSource, names: Sequence[str], bits: int) -> Levels:
    """Weights of the same inputs, one after the other: the integers that they have, or those of the least squared error; of
    4 bits without what an adapter added.

    Args:
        bits: 8, or 4: of matrices that have more in the model's file it is 8 all the same.

    Raises:
        ConfigError: the model's integers have other bits, or a scale for a part of 32 inputs.
    """
    if bits == 4 and source.wider(names):
        bits = 8
    if bits == 8 or source.has_integers(names):
        stored = source.blocks(names, BlockFormat(bits, BLOCK))
        scales, middle = torch.from_numpy(stored.scales), float(1 << (bits - 1))
        values = torch.from_numpy(stored.levels())
        zero = (values == middle).all(-1)  # whose step would be too large a unit for the others of its row
        scales = torch.where(zero, 0.0, scales)
        factors = _factors(scales)
        steps = (scales / factors).half().float() * factors
        return Levels(values, steps, -middle * steps, bits)
    weight = torch.cat([source.without_update(name) for name in names])
    filled = F.pad(weight, (0, -weight.shape[1] % BLOCK))
    values, steps, lows = fit_levels(filled.view(len(filled), -1, BLOCK), bits)
    flat = values.amin(-1) == values.amax(-1)  # the same
    lows = torch.where(flat, lows + steps * values[..., 0], lows)
    values, steps, lows = _in_fp16(values, torch.where(flat, 0.0, steps), lows, bits)
    factors = _factors(torch.maximum(steps.abs(), lows.abs()))
    kept = [(part / factors).half().float() * factors for part in (steps, lows)]
    return Levels(values, kept[0], kept[1], bits)


def _in_fp16(values: Tensor, steps: Tensor, lows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers by the low that fp16 holds best: where levels are left over another one, or the other end of the block.

    ggml's Q4_0 is one of -8 steps, of either sign, and -7 of them may have no number in fp16.
    """
    top, largest, least = (1 << bits) - 1, values.amax(-1), values.amin(-1)
    best, chosen = torch.full_like(lows, torch.inf), torch.zeros(lows.shape, dtype=torch.int16)
    for end in range(-top, 2 * top + 1):  # a level: the low's, of rising levels; or, of falling ones, the high's
        upwards = end <= 0
        fits = (
            (largest.to(torch.int16) - end <= top)
            if upwards
            else (largest <= end) & (end - least.to(torch.int16) <= top)
        )
        tried = lows + end * steps
        factors = _factors(tried)
        error = (tried - (tried / factors).half().float() * factors).abs()
        better = fits & (error < best)
        best, chosen = torch.where(better, error, best), torch.where(better, end, chosen).to(torch.int16)
    down = chosen > 0
    moved = values.to(torch.int16) - chosen[..., None]
    moved = torch.where(down[..., None], -moved, moved).to(torch.uint8)
    return moved, torch.where(down, -steps, steps), lows + chosen * steps


def _factors(largest: Tensor) -> Tensor:
    """(out, blocks) -> (out, 1): powers of two, by which the largest of a row comes near fp16's."""
    top = largest.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    return torch.exp2(torch.floor(torch.log2(top))) / _TOP


def tiles(levels: Levels) -> dict[str, Tensor]:
    """The three parts of a stored matrix; outputs of zeros fill the last tile up."""
    out, blocks = levels.steps.shape
    short = -out % LANES
    values = F.pad(levels.values, (0, 0, 0, 0, 0, short))
    if levels.bits == 4:
        halves = values.view(-1, blocks, 4, 2, 4)
        values = halves[..., 0, :] | (halves[..., 1, :] << 4)
    lines = (
        values.reshape(-1, LANES, blocks, levels.bits, 4).permute(0, 2, 3, 1, 4).reshape(-1, blocks, 64 * levels.bits)
    )
    steps, lows = (F.pad(part, (0, 0, 0, short)) for part in (levels.steps, levels.lows))
    factors = _factors(torch.maximum(steps.abs(), lows.abs()))
    both = torch.stack((steps / factors, lows / factors), 1).half().view(-1, LANES, 2, blocks)
    return {
        LEVELS: lines.contiguous(),
        STEPS: both.permute(0, 3, 2, 1).contiguous(),
        FACTORS: factors.view(-1, LANES).contiguous(),
    }


def tile_shapes(out_features: int, in_features: int, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `tiles` gives."""
    count, blocks = -(-out_features // LANES), -(-in_features // BLOCK)
    return {
        LEVELS: ((count, blocks, 64 * bits), torch.uint8),
        STEPS: ((count, blocks, 2, LANES), torch.float16),
        FACTORS: ((count, LANES), torch.float32),
    }


def untiled(parts: Mapping[str, Tensor]) -> Tensor:
    """(out, in) fp32 of what `tiles` gives, with what fills up tiles and blocks."""
    return token_rows(torch.arange(parts[FACTORS].numel()), parts)


def token_rows(rows: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Some outputs' weights, (...) int64 -> (..., blocks * 32) fp32: the vectors of tokens, of an embedding."""
    tile, lane = rows // LANES, rows % LANES
    levels = parts[LEVELS]
    count, blocks, size = levels.shape
    four = levels.view(count, blocks, size // 64, LANES, 4)[tile, :, :, lane]  # (..., blocks, lines, 4)
    if size == 64 * 4:
        four = torch.stack((four & 15, four >> 4), -2)
    values = four.reshape(*rows.shape, blocks, BLOCK).float()
    both = parts[STEPS][tile, :, :, lane].float()
    values = values * both[..., 0, None] + both[..., 1, None]
    return (values * parts[FACTORS][tile, lane][..., None, None]).flatten(-2)
