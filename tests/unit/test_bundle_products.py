"""The linear layers of a torch bundle's program: by oneDNN where that is faster, beside fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from arriero import onednn
from arriero.export import torch_graph

pytestmark = pytest.mark.skipif(not onednn.has_onednn(), reason="this torch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken on whatever processor the tests run; the shape of each of its products."""
    found: list[tuple[int, ...]] = []

    def told(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found.append(tuple(x.shape))
        return onednn.onednn_product(x, weight, bias)

    monkeypatch.setattr(torch_graph, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch_graph, "onednn_product", told)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_fp64(calls: list[tuple[int, ...]], shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 24), torch.randn(40, 24), torch.randn(40) if with_bias else None
    with torch.inference_mode():
        found = torch_graph._linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert calls == [(*shape, 24)]


def test_other_formats_and_layouts_are_torchs(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(6, 8), torch.randn(10, 8)
    for a, b in (
        (x.double(), weight.double()),
        (x, torch.randn(8, 10).t()),
        (x[0], weight),
        (x.bfloat16(), weight.bfloat16()),
    ):
        torch.testing.assert_close(torch_graph._linear(a, b), F.linear(a, b))
    assert not calls


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((6, 8), (10, 7), None),
        ((6, 8), (10, 8), (9,)),
        ((6, 8), (8,), (3,)),
        ((6, 8), (2, 10, 8), None),
        ((6, 0), (10, 8), None),
    ],
)
def test_what_does_not_fit_is_refused(
    calls: list[tuple[int, ...]], x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    with pytest.raises(RuntimeError):
        torch_graph._linear(torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias))
    assert not calls


def test_no_rows_and_other_processors_are_torchs(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 8), torch.randn(10, 8)
    assert torch_graph._linear(x[:0], weight).shape == (0, 10)
    monkeypatch.setattr(torch_graph, "onednn_is_faster", lambda: False)
    assert torch.equal(torch_graph._linear(x, weight), F.linear(x, weight))
    assert not calls
