"""How many rows oneDNN's kernels are given: few different numbers, and never another result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arriero.models.packed_linear import FEW_ROWS, MANY_ROWS, PackedGate, PackedLinear, has_kernels, kernel_rows


def test_few_numbers_of_rows_and_little_in_vain() -> None:
    assert [kernel_rows(rows) for rows in range(1, FEW_ROWS)] == [FEW_ROWS] * (FEW_ROWS - 1)
    given = {rows: kernel_rows(rows) for rows in range(FEW_ROWS, 4097)}
    assert all(rows <= given[rows] <= rows * (1 + 1 / 16) for rows in given)
    assert all(given[rows] == rows for rows in range(FEW_ROWS, MANY_ROWS + 1))
    assert len(set(given.values())) == MANY_ROWS - FEW_ROWS + 1 + 16 * 7  # 16 for each doubling from 32 to 4096
    assert all(kernel_rows(rows) == rows for rows in set(given.values()))


@pytest.mark.skipif(not has_kernels(torch.device("cpu"), torch.float32), reason="this torch has no such kernels")
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 31, 33, 65, 127, 130])
def test_products_are_those_of_the_layers(rows: int, copy: bool) -> None:
    torch.manual_seed(rows)
    first, second = nn.Linear(24, 40), nn.Linear(24, 40)
    square = nn.Linear(24, 24, bias=False)
    x = torch.randn(rows, 24)
    with torch.no_grad():
        wanted = torch.cat([first(x), second(x)], -1), F.silu(first(x)) * second(x), square(x) + x
        both = PackedLinear([first, second], copy=copy)(x)
        gated = PackedGate(first, second, copy=copy)(x)
        summed = PackedLinear([square], copy=copy).plus(x, x.clone())
    for found, truth in zip((both, gated, summed), wanted, strict=True):
        assert found.shape == truth.shape
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
