"""The products of training: what oneDNN computes beside fp64, when it is called, and a training run by both libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arriero import onednn as onednn_library
from arriero import processor_info
from arriero.models import products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


onednn, onednn_gradient = products._onednn, products._onednn_gradient


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """oneDNN is called on whatever processor the tests run, for products of any size; the rows of each call."""
    called: list[int] = []

    def told(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        called.append(x.numel() // x.shape[-1])
        return onednn(x, weight, bias)

    def gradient_told(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        called.append(len(grad))
        return onednn_gradient(grad, x, weight)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(onednn_library, "LEAST", 1)
    monkeypatch.setattr(products, "_onednn_gradient", gradient_told)
    monkeypatch.setattr(products, "_onednn", told)
    with products.fast_products(one_shape=True):
        yield called


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_fp64(everywhere: list[int], shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40) if with_bias else None
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in given]
    y, truth = products.linear(*given), F.linear(*wide)
    grad = torch.randn_like(y)
    y.backward(grad)
    truth.backward(grad.double())
    assert len(everywhere) == 3
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given, wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.shape == ours.shape
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_matrices_that_are_views_are_multiplied_as_they_are_seen(everywhere: list[int]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(30, 50), torch.randn(50, 20)
    views = [
        (a, b),
        (a.t().contiguous().t(), b),
        (a, b.t().contiguous().t()),
        (a[3:, 10:], b[10:]),
        (a[:, ::2], b[::2, ::3]),
    ]
    for left, right in views:
        torch.testing.assert_close(
            products.product(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5
        )
    assert len(everywhere) == len(views)


def test_the_gradient_of_a_matrix_from_factors_that_are_views(everywhere: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 24)[:, :, 1].requires_grad_()
    weight = torch.randn(24, 40).t().requires_grad_()
    grad = torch.randn(40, 4, 6).permute(1, 2, 0)
    products.linear(x, weight).backward(grad)
    truth = grad.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), truth, rtol=1e-5, atol=1e-5)
    assert len(everywhere) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at_once", [7, 1000])
def test_a_gradient_is_added_up_over_parts_of_the_rows(
    everywhere: list[int], monkeypatch: pytest.MonkeyPatch, at_once: int, dtype: torch.dtype
) -> None:
    """In runs of outputs too; what the place holds before the first part is not read."""
    monkeypatch.setattr(products, "ADDED_AT_ONCE", at_once)
    torch.manual_seed(0)
    grad, x = torch.randn(30, 40).to(dtype), torch.randn(30, 24).to(dtype)
    total = torch.full((40, 24), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    for first, part in ((True, slice(0, 13)), (False, slice(13, 22)), (False, slice(22, 30))):
        products.add_weight_gradient(total, grad[part], x[part], first=first)
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(total.double(), grad.double().t() @ x.double(), rtol=error, atol=2 * error)
    assert len(everywhere) == (3 * -(-40 // at_once) if dtype == torch.float32 else 0)


def test_only_the_gradients_that_are_asked_for_are_computed(everywhere: list[int]) -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8)
    products.linear(x, weight).sum().backward()
    assert len(everywhere) == 2
    with torch.no_grad():
        assert not products.linear(x, weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_torchs_own(everywhere: list[int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 8, dtype=dtype), torch.randn(10, 8, dtype=dtype)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(x.float(), weight.float()).dtype == torch.bfloat16
    assert not everywhere


def test_small_products_and_code_outside_of_a_run_are_torchs_own(
    everywhere: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(6, 8), torch.randn(10, 8)
    monkeypatch.setattr(onednn_library, "LEAST", 6 * 8 * 10 + 1)
    products.linear(x, weight)
    assert not everywhere
    monkeypatch.setattr(onednn_library, "LEAST", 6 * 8 * 10)
    products.linear(x, weight)
    assert len(everywhere) == 1
    monkeypatch.setattr(products, "_active", False)
    products.linear(x, weight)
    assert len(everywhere) == 1


def test_a_compiled_layer_computes_the_same(everywhere: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # as they are: the compiler would trace what tells their calls
    monkeypatch.setattr(products, "_onednn", onednn)
    monkeypatch.setattr(products, "_onednn_gradient", onednn_gradient)
    layer = products.Linear(8, 10)
    x = torch.randn(6, 8, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append((y.detach(), layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_number_of_compiled_kernels_is_limited_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr("os.environ", {"LRU_CACHE_CAPACITY": "7"})
    with products.fast_products(one_shape=True):
        assert os.environ == {"LRU_CACHE_CAPACITY": "7"}
    with products.fast_products():
        assert os.environ == {
            "LRU_CACHE_CAPACITY": "7",
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(onednn_library.KEPT_SHAPES),
        }


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx2 avx512f\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f\n", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx2\n", False),  # a guest may be told less
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx2 avx512f\n", False),
        ("CPU implementer\t: 0x41\nFeatures\t: asimd bf16\n", False),
    ],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(processor_info, "_CPU_INFO", tmp_path / "cpuinfo")
    assert processor_info.has_units_that_mkl_leaves() == expected
