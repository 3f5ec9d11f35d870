"""Linear layers in tiles: the same as in rows, of any size, in the fewest bits that hold them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arriero.models.row_tiles import linear, narrowest, products, tiled


@pytest.mark.parametrize(("rows", "size", "width"), [(1, 16, 8), (3, 37, 5), (8, 1, 1), (2, 96, 33)])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_a_linear_layer(rows: int, size: int, width: int, lanes: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, matrix, bias = (torch.randn(shape, generator=generator) for shape in ((rows, width), (size, width), (size,)))
    tiles = tiled(matrix, lanes=lanes, dtype=torch.float32)
    assert tiles.is_contiguous()
    assert tiles.shape[1:] == (width, 2, lanes)
    torch.testing.assert_close(linear(x, tiles, size, None), F.linear(x, matrix))
    torch.testing.assert_close(linear(x, tiles, size, bias), F.linear(x, matrix, bias))


def test_two_matrices_side_by_side() -> None:
    gate, up, x = torch.randn(21, 6), torch.randn(21, 6), torch.randn(2, 6)
    for row, (first, second) in zip(x, products(x, tiled(gate, up, lanes=8, dtype=torch.float32)), strict=True):
        torch.testing.assert_close(first.flatten()[:21], gate @ row)
        torch.testing.assert_close(second.flatten()[:21], up @ row)


def test_16_bits_where_nothing_is_lost() -> None:
    bf16, fp16 = torch.tensor([1.0, 3e38, 1e-30]).bfloat16().float(), torch.tensor([1.0, 1.0009765625])
    assert narrowest([bf16, torch.tensor([-2.5])]) == torch.bfloat16
    assert narrowest([fp16, torch.tensor([-2.5])]) == torch.float16
    assert narrowest([bf16, fp16]) == torch.float32  # neither holds both
    assert narrowest([torch.tensor([0.1])]) == torch.float32
