"""Packers of the ggml types Q4_K, Q5_K and Q6_K, in which 256 numbers share a block of scales.

The `gguf` package reads these types but cannot write them. The searches and the layouts are those of ggml's
ggml/src/ggml-quants.c (`quantize_row_q4_K_ref`, `quantize_row_q5_K_ref`, `quantize_row_q6_K_ref`, `make_qkx2_quants`,
`make_qx_quants`): fp32 in the same order of operations, so that the bytes are the same. Everywhere the last axis runs over
groups and the one before it over the numbers of a group: sums over axis 0 then add one number after the other, as C does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPER_BLOCK = 256
_TINY = np.float32(1e-15)  # GROUP_MAX_EPS: below it a group is all zero


def pack_q4_k(rows: Floats) -> Bytes:
    """(..., n * 256) fp32 -> (..., n * 144) bytes: 4 bits a number, 6-bit scale and minimum a group of 32."""
    blocks = rows.reshape(-1, SUPER_BLOCK)
    header, quants = _scaled_with_minimum(blocks, levels=15, first=-1.0, tries=20)
    return np.concatenate([header, _nibbles(quants)], axis=1).reshape(*rows.shape[:-1], -1)


def pack_q5_k(rows: Floats) -> Bytes:
    """(..., n * 256) fp32 -> (..., n * 176) bytes: as Q4_K with a fifth bit a number."""
    blocks = rows.reshape(-1, SUPER_BLOCK)
    header, quants = _scaled_with_minimum(blocks, levels=31, first=-0.5, tries=15)
    high = quants.reshape(-1, 8, 32) >> 4
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth: Bytes = np.bitwise_or.reduce(high << shifts, axis=1)
    return np.concatenate([header, fifth, _nibbles(quants & np.uint8(15))], axis=1).reshape(*rows.shape[:-1], -1)


def pack_q6_k(rows: Floats) -> Bytes:
    """(..., n * 256) fp32 -> (..., n * 210) bytes: 6 bits a number, an 8-bit scale a group of 16."""
    blocks = rows.reshape(-1, SUPER_BLOCK)
    count = len(blocks)
    grouped = np.ascontiguousarray(blocks.reshape(-1, 16).T)  # (16, groups)
    scales, quants = _symmetric_scale(grouped, half=32)
    per_block = scales.reshape(count, 16)
    largest = np.take_along_axis(per_block, np.abs(per_block).argmax(axis=1)[:, None], axis=1)
    empty = np.abs(largest) < _TINY
    inverse = np.divide(np.float32(-128), largest, out=np.zeros_like(largest), where=~empty)
    delta = np.divide(np.float32(1), inverse, out=np.zeros_like(inverse), where=~empty).astype(np.float16)
    steps = np.minimum(np.rint(inverse * per_block), 127).astype(np.int8)
    effective = (delta.astype(np.float32) * steps).reshape(1, -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        again = np.clip(np.rint(grouped / effective), -32, 31) + 32
    chosen: Bytes = np.where(effective != 0, again, quants).astype(np.uint8)
    packed = chosen.T.reshape(count, 2, 4, 32)
    packed[empty[:, 0]] = 0
    low = (packed[:, :, :2] & 15) | ((packed[:, :, 2:] & 15) << 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    high: Bytes = np.bitwise_or.reduce((packed >> 4) << shifts, axis=2)
    pieces = (low.reshape(count, 128), high.reshape(count, 64), steps.view(np.uint8), delta.view(np.uint8))
    return np.concatenate(pieces, axis=1).reshape(*rows.shape[:-1], -1)


def _nibbles(quants: Bytes) -> Bytes:
    """(n, 256) numbers below 16 -> (n, 128): of every 64, the first 32 in the low halves of bytes, the others above."""
    pairs = quants.reshape(-1, 4, 2, 32)
    packed: Bytes = (pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    return packed


def _scaled_with_minimum(blocks: Floats, *, levels: int, first: float, tries: int) -> tuple[Bytes, Bytes]:
    """The 16 bytes of scales and minima of each block, and its 256 quantised numbers."""
    count = len(blocks)
    grouped = np.ascontiguousarray(blocks.reshape(-1, 32).T)  # (32, groups)
    mean = np.sqrt(np.add.reduce(grouped * grouped, axis=0) / np.float32(32))
    weights = mean + np.abs(grouped)
    scales, minima, quants = _scale_and_minimum(grouped, weights, levels, first, tries)
    scales, minima = scales.reshape(count, 8), minima.reshape(count, 8)
    scale_steps, delta = _six_bits(scales)
    minimum_steps, delta_minimum = _six_bits(minima)
    effective = (delta.astype(np.float32) * scale_steps).reshape(1, -1)
    offset = (delta_minimum.astype(np.float32) * minimum_steps).reshape(1, -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        again = np.clip(np.rint((grouped + offset) / effective), 0, levels)
    chosen: Bytes = np.where(effective != 0, again, quants).astype(np.uint8)
    low = scale_steps[:, :4] | ((scale_steps[:, 4:] >> 4) << 6)
    middle = minimum_steps[:, :4] | ((minimum_steps[:, 4:] >> 4) << 6)
    high = (scale_steps[:, 4:] & 15) | ((minimum_steps[:, 4:] & 15) << 4)
    header = np.concatenate([delta.view(np.uint8), delta_minimum.view(np.uint8), low, middle, high], axis=1)
    return header, np.ascontiguousarray(chosen.T).reshape(count, SUPER_BLOCK)


def _six_bits(values: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """(n, 8) numbers of a block as multiples below 64 of an fp16 step."""
    largest = np.maximum(values.max(axis=1, keepdims=True), np.float32(0))
    inverse = np.divide(np.float32(63), largest, out=np.zeros_like(largest), where=largest > 0)
    # C stores the rounded number as an unsigned byte before it takes the smaller one
    steps = np.rint(inverse * values).astype(np.int32).astype(np.uint8)
    return np.minimum(steps, np.uint8(63)), (largest / np.float32(63)).astype(np.float16)


def _scale_and_minimum(
    x: Floats, weights: Floats, levels: int, first: float, tries: int
) -> tuple[Floats, Floats, Floats]:
    """Scale and minimum with the least weighted squared error among some candidates (`make_qkx2_quants`).

    Args:
        x: (32, groups).
        weights: (32, groups).
        levels: the largest quantised number.
        first: what is added to `levels` in the first try; a tenth more in each further one.

    Returns:
        Scales (groups,), what is subtracted (groups,), and the quantised numbers (32, groups).
    """
    one = np.float32(1)
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat = high == low
    weight_sum = np.add.reduce(weights, axis=0)
    x_sum = np.add.reduce(weights * x, axis=0)
    span = np.where(flat, one, high - low)
    inverse = np.float32(levels) / span
    scale = np.where(flat, np.float32(0), one / inverse)
    best = _rounded(inverse * (x - low), levels)
    best_error = _weighted_error(best, scale, low, x, weights)
    for number in range(tries + 1):
        span = np.where(flat, one, high - low)
        factor = np.float32(first) + np.float32(0.1) * np.float32(number) + np.float32(levels)
        found = _rounded((factor / span) * (x - low), levels)
        weighted = weights * found
        found_sum, square_sum = np.add.reduce(weighted, axis=0), np.add.reduce(weighted * found, axis=0)
        product_sum = np.add.reduce(weighted * x, axis=0)
        determinant = weight_sum * square_sum - found_sum * found_sum
        with np.errstate(all="ignore"):
            new_scale = (weight_sum * product_sum - x_sum * found_sum) / determinant
            new_low = (square_sum * x_sum - found_sum * product_sum) / determinant
            new_scale = np.where(new_low > 0, product_sum / square_sum, new_scale)
            new_low = np.minimum(new_low, np.float32(0))
            error = _weighted_error(found, new_scale, new_low, x, weights)
            better = (determinant > 0) & (error < best_error) & ~flat
        np.copyto(best, found, where=better)
        best_error = np.where(better, error, best_error)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
    best[:, flat] = 0
    return scale, -low, best


def _rounded(values: Floats, levels: int) -> Floats:
    rounded: Floats = np.clip(np.rint(values, out=values), np.float32(0), np.float32(levels), out=values)
    return rounded


def _weighted_error(quants: Floats, scale: Floats, low: Floats, x: Floats, weights: Floats) -> Floats:
    difference = scale * quants + low - x
    total: Floats = np.add.reduce(weights * (difference * difference), axis=0)
    return total


def _symmetric_scale(x: Floats, half: int) -> tuple[Floats, Floats]:
    """Scale of least squared error, weighted by the squares of the numbers (`make_qx_quants`, rmse_type 1).

    Args:
        x: (n, groups).
        half: quantised numbers run from -half to half - 1.

    Returns:
        Scales (groups,), which may be negative, and the quantised numbers plus `half` (n, groups).
    """
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    zero = np.abs(extreme) < _TINY
    extreme = np.where(zero, np.float32(1), extreme)
    weights = x * x
    weighted = weights * x

    def search(shift: Any) -> tuple[Floats, Floats, Floats]:
        inverse = -(np.float32(half) + shift) / extreme
        found = np.clip(np.rint(inverse * x), np.float32(-half), np.float32(half - 1))
        return found, np.add.reduce(weighted * found, axis=0), np.add.reduce(weights * found * found, axis=0)

    quants, products, squares = search(np.float32(0))
    with np.errstate(all="ignore"):
        scale = np.where(squares != 0, products / squares, np.float32(0))
    best = scale * products
    for number in (*range(-9, 0), *range(1, 10)):
        found, products, squares = search(np.float32(0.1) * np.float32(number))
        with np.errstate(all="ignore"):
            better = (squares > 0) & (products * products > best * squares)
            new_scale = products / squares
            np.copyto(quants, found, where=better)
            scale = np.where(better, new_scale, scale)
            best = np.where(better, new_scale * products, best)
    quants += np.float32(half)
    quants[:, zero] = 0
    return np.where(zero, np.float32(0), scale), quants
