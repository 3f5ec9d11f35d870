"""How many rows oneDNN's kernels are given: few different numbers, and never another result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arriero.models import packed_linear
from arriero.models.packed_linear import (
    BF16_PRODUCTS,
    FEW_ROWS,
    MANY_ROWS,
    PackedGate,
    PackedLinear,
    has_kernels,
    kernel_rows,
)


def test_few_numbers_of_rows_and_little_in_vain() -> None:
    assert [kernel_rows(rows) for rows in range(1, FEW_ROWS)] == [FEW_ROWS] * (FEW_ROWS - 1)
    given = {rows: kernel_rows(rows) for rows in range(FEW_ROWS, 4097)}
    assert all(rows <= given[rows] <= rows * (1 + 1 / 16) for rows in given)
    assert all(given[rows] == rows for rows in range(FEW_ROWS, MANY_ROWS + 1))
    assert len(set(given.values())) == MANY_ROWS - FEW_ROWS + 1 + 16 * 7  # 16 for each doubling from 32 to 4096
    assert all(kernel_rows(rows) == rows for rows in set(given.values()))


@pytest.mark.skipif(not has_kernels(torch.device("cpu"), torch.float32), reason="this torch has no such kernels")
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 31, 33, 65, 127, 130])
def test_products_are_those_of_the_layers(rows: int, intel: bool, copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_prefers_mkl", lambda: intel)
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


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_products_in_bf16(rows: int, copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels that this processor may have to emulate: as fp32 computes them, but for rounding."""
    monkeypatch.setattr(packed_linear, "features", lambda: BF16_PRODUCTS)
    if not has_kernels(torch.device("cpu"), torch.bfloat16) or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this torch or this processor has no such kernels")
    torch.manual_seed(rows)
    first, second = nn.Linear(24, 40).bfloat16(), nn.Linear(24, 40).bfloat16()
    square = nn.Linear(24, 24).bfloat16()
    x = torch.randn(rows, 24).bfloat16()
    with torch.no_grad():
        gated = PackedGate(first, second, copy=copy)(x)
        summed = PackedLinear([square], copy=copy).plus(x, x.clone())
        for layer in (first, second, square):
            layer.float()
        wide = x.float()
        wanted = F.silu(first(wide)) * second(wide), square(wide) + wide
    for found, truth in zip((gated, summed), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - truth).abs().max() <= torch.finfo(torch.bfloat16).eps * truth.abs().max()
