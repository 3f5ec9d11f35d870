"""Parts of attention: each kernel's output, sums and gradients against the definition, alone and put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.models.block_attention import Block, attend, attend_backward

SCALE = 0.3
BLOCKS = {
    "documents": Block(2, 2, (3, 1, 6), (3, 1, 6)),
    "documents, window": Block(2, 2, (3, 1, 6), (3, 1, 6), window=2),
    "window of one": Block(0, 0, (5,), (5,), window=1),
    "rectangle": Block(4, 1, (5,), (3,), 3),
    "rectangle, window that sees all": Block(4, 1, (5,), (3,), 3, 8),
    "rectangle, window": Block(4, 1, (3,), (4,), 6, 6),
    "one query, one key": Block(0, 6, (1,), (1,), 9),
}


def seen(block: Block) -> Tensor:
    """(Tq, Tk) bool, by the words of `Block`: a loop over pairs."""
    mask = torch.zeros(sum(block.lengths), sum(block.key_lengths), dtype=torch.bool)
    row = column = 0
    for queries, keys in zip(block.lengths, block.key_lengths, strict=True):
        for i in range(queries):
            for j in range(keys):
                back = block.distance + i - j
                mask[row + i, column + j] = back >= 0 and (block.window is None or back < block.window)
        row, column = row + queries, column + keys
    return mask


def inputs(dtype: torch.dtype, heads: int = 6, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(12, heads, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(12, groups, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def by_definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output (Tq, H, D) and log-sum-exp (Tq, H)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * SCALE
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), value), scores.logsumexp(-1).T


@pytest.mark.parametrize("kernel", ["cpu", "written out"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_output_sums_and_gradients(name: str, kernel: Any, dtype: torch.dtype, limit: float) -> None:
    block, (query, key, value) = BLOCKS[name], inputs(dtype)
    given = [x.detach().clone() for x in (query[block.queries], key[block.keys], value[block.keys])]
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in given]
    expected, sums = by_definition(*exact, seen(block))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected.backward(grad.double())

    output, log_sum = attend(*given, block, SCALE, kernel)
    gradients = attend_backward(grad, *given, output, log_sum, block, SCALE, kernel)

    assert output.dtype == gradients[0].dtype == dtype
    assert log_sum.dtype == torch.promote_types(dtype, torch.float32)
    assert float((output.double() - expected.detach()).abs().max()) < limit
    assert float((log_sum.double() - sums.detach()).abs().max()) < min(limit, 2e-6)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert theirs.grad is not None
        assert float((ours.double() - theirs.grad).abs().max()) < limit * max(1.0, float(theirs.grad.abs().max()))


@pytest.mark.parametrize("kernel", ["cpu", "written out"])
def test_parts_with_the_whole_sum_give_the_gradients_of_the_whole(kernel: Any) -> None:
    """Four queries over a causal block of their own and a rectangle before it."""
    query, key, value = (x.requires_grad_() for x in inputs(torch.float64))
    queries, before, own = slice(5, 9), slice(2, 5), slice(5, 9)
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3)
    expected, _ = by_definition(query[queries], key[2:9], value[2:9], mask)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(grad)

    q, k, v = (x.detach() for x in (query, key, value))
    blocks = [(own, Block(5, 5, (4,), (4,))), (before, Block(5, 2, (4,), (3,), 3))]
    parts = [attend(q[queries], k[at], v[at], block, SCALE, kernel) for at, block in blocks]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    output = sum(part * (log_sum - total).exp()[..., None] for part, log_sum in parts)
    assert isinstance(output, Tensor)
    torch.testing.assert_close(output, expected.detach(), atol=1e-13, rtol=0)
    of_query = torch.zeros_like(q[queries])
    for at, block in blocks:
        found = attend_backward(grad, q[queries], k[at], v[at], output, total, block, SCALE, kernel)
        of_query += found[0]
        for ours, whole in zip(found[1:], (key, value), strict=True):
            assert whole.grad is not None
            torch.testing.assert_close(ours, whole.grad[at], atol=1e-13, rtol=0)
    assert query.grad is not None
    torch.testing.assert_close(of_query, query.grad[queries], atol=1e-13, rtol=0)


def test_autocast_does_not_round_what_is_written_out() -> None:
    block, (query, key, value) = Block(0, 0, (12,), (12,)), inputs(torch.float32)
    plain, _ = attend(query, key, value, block, SCALE, "written out")
    with torch.autocast("cpu", torch.bfloat16):
        within, _ = attend(query, key, value, block, SCALE, "written out")
    assert torch.equal(plain, within)
