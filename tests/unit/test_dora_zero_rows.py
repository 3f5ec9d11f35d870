"""DoRA on a weight with rows of zeros, as pruned models have: they have no direction, and the others are not disturbed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from arriero.adapters.dora import DoRALinear, start_magnitude
from arriero.adapters.lora import merge_lora
from arriero.adapters.lora_config import LoRAConfig

ROW = 3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[0.0, 0.5], ids=["", "dropout"])
def layer(request: pytest.FixtureRequest) -> DoRALinear:
    """As it starts: lengths of the base's rows, and B of zeros."""
    base = nn.Linear(12, 8)
    base.weight.data = random(8, 12, seed=0)
    base.weight.data[ROW] = 0
    made = DoRALinear(base, LoRAConfig(rank=2, alpha=4.0, use_dora=True, dropout=request.param))
    made.lora_A.weight.data = random(2, 12, seed=1)
    made.lora_B.weight.data.zero_()
    made.lora_magnitude_vector.data = start_magnitude(base.weight)
    return made


def test_it_starts_from_the_base(layer: DoRALinear) -> None:
    x, weight = random(5, 12, seed=2), layer.weight.detach().clone()
    expected = x @ weight.T + layer.bias
    torch.testing.assert_close(layer.eval()(x), expected)
    model = nn.Sequential(layer)
    merge_lora(model)
    torch.testing.assert_close(model[0].weight, weight)
    torch.testing.assert_close(model(x), expected)


def test_it_trains(layer: DoRALinear) -> None:
    x, target = random(5, 12, seed=2), random(5, 8, seed=3)
    optimizer = torch.optim.SGD([layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector], lr=0.05)
    for _ in range(4):
        loss = (layer.train()(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector):
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
        optimizer.step()
    total = layer.weight.double() + 2.0 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    lengths = total.square().sum(1, keepdim=True).sqrt()
    assert lengths[ROW] > 0  # the update gave the row a direction
    expected = layer.lora_magnitude_vector.double()[:, None] * total / lengths  # equation 5
    torch.testing.assert_close(layer.merged().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.eval()(x).double(), x.double() @ expected.T + layer.bias, rtol=1e-5, atol=1e-5)
