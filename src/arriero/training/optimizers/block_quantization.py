"""Block-wise dynamic quantisation to 8 bits (Dettmers et al. 2022, arXiv:2110.02861).

Every block of `BLOCK` neighbours is divided by its greatest absolute value, and each number becomes the index of the nearest
of 256 values. These *dynamic* values lie closer together where they are small: seven decades from 1 downwards, each with half
the fractions of the one above (Dettmers 2016, arXiv:1511.04561).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # as bitsandbytes and torchao have it; the paper's 2048 gives coarser scales for little memory
_DECADES = 7


def dynamic_values(signed: bool) -> Tensor:
    """The 256 values of a code, ascending, (256,) fp32.

    Decade i (of 10**(i-6)) is cut into 2**i (signed) or 2**(i+1) equal parts from 0.1 to 1 of it, whose middles are values;
    signed ones come with both signs. 0 and 1 complete them (and in the unsigned case 128 parts of the last decade).
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - _DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float()


class Codec:
    """Encodes numbers of [-1, 1] (signed) or [0, 1] as the index of the nearest dynamic value.

    A binary search (`torch.bucketize`) takes 25 times as long on a CPU as a look-up by the upper 16 bits of the number. These
    leave two neighbouring codes at most, since no two borders between codes are so close; one comparison decides.
    """

    def __init__(self, signed: bool, device: torch.device) -> None:
        self.values = dynamic_values(signed).to(device)
        borders = (self.values[1:] + self.values[:-1]) / 2
        self.borders = torch.cat((borders, borders.new_tensor([float("inf")])))
        upper = torch.arange(2**16, dtype=torch.int32, device=device)
        # the least number with these upper bits: of the negative ones, that with all lower bits set
        lowest = torch.where(upper < 2**15, upper << 16, (upper << 16) | 0xFFFF).view(torch.float32)
        self.first = torch.bucketize(lowest.nan_to_num(0.0), borders, out_int32=True)

    def encode(self, x: Tensor) -> Tensor:
        """The codes, uint8, of flat fp32 numbers."""
        codes = self.first.index_select(0, (x.view(torch.int32) >> 16) & 0xFFFF)
        return codes.add_(x > self.borders.index_select(0, codes)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers, fp32, of flat codes."""
        return self.values.index_select(0, codes.int())


@lru_cache(maxsize=8)
def codec(signed: bool, device: torch.device) -> Codec:
    """The codec of a device."""
    return Codec(signed, device)


def blocks(count: int) -> int:
    """How many blocks `count` numbers fill."""
    return -(-count // BLOCK)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (N,) uint8 and scales (blocks(N),) fp32 of x (N,) fp32."""
    count = x.numel()
    rows = F.pad(x, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(1)
    # a block of zeros stays one; so small a divisor that no squared gradient is lost to it
    rows = rows / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return codec(signed, x.device).encode(rows.view(-1))[:count], scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The numbers (N,) fp32 of codes (N,) and scales (blocks(N),)."""
    return _scaled(codec(signed, codes.device).decode(codes), scales)


def dequantize_exactly(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Numbers as `dequantize` gives them, of which `quantize` makes the same codes and scales again.

    The greatest number of a block gives its scale, and where that is negative it has no value of its own: the least one is
    -0.993. So its code is taken as -1 here. (Scales below 1e-31 are left out: their small values are no normal numbers.)
    """
    values = codec(signed, codes.device).decode(codes)
    return _scaled(values.masked_fill_(codes == 0, -1.0) if signed else values, scales)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    count = values.numel()
    rows = F.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    return (rows * scales[:, None]).view(-1)[:count]
