"""The CRC-32 of bytes whose parts' checksums are known, so that several threads compute them.

A CRC is linear over GF(2): appending n zero bytes to what it is of is a matrix of 32 x 32 bits applied to it, and the
checksum of two runs is the one of the first so moved, plus (exclusive or) the one of the second. After `crc32_combine` of
zlib (Mark Adler).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

_POLYNOMIAL = 0xEDB88320  # of zip and zlib, its bits reversed
_Matrix = tuple[int, ...]  # the images of the 32 bits


class Summed(Protocol):
    """A run of bytes: how many, and their CRC-32."""

    nbytes: int
    checksum: int


def checksum(parts: Iterable[Summed]) -> int:
    """The CRC-32 of runs that follow each other."""
    total = 0
    for part in parts:
        total = _applied(_zeros(part.nbytes), total) ^ part.checksum
    return total


@lru_cache(maxsize=64)
def _zeros(nbytes: int) -> _Matrix:
    """What so many zero bytes make of a checksum."""
    result: _Matrix = tuple(1 << bit for bit in range(32))
    power: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # of one zero bit
    for _ in range(3):
        power = _product(power, power)
    while nbytes:
        if nbytes & 1:
            result = _product(power, result)
        power = _product(power, power)
        nbytes >>= 1
    return result


def _product(one: _Matrix, other: _Matrix) -> _Matrix:
    return tuple(_applied(one, image) for image in other)


def _applied(matrix: _Matrix, bits: int) -> int:
    result = 0
    for image in matrix:
        if bits & 1:
            result ^= image
        bits >>= 1
        if not bits:
            break
    return result
