"""Ring attention on a GPU: flash attention's parts of a row against attention over all of it, for every place in a ring.

The bodies run on the CPU too, so that they are known to be right before they meet a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from arriero.models.attention import AttentionInfo, attention
from arriero.models.block_attention import choose_kernel
from arriero.parallel import ring as ring_module
from arriero.parallel.ring import RingAttention

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SIZE, CHUNK, HEADS, GROUPS, DIM = 4, 32, 4, 2, 16
TOKENS = 2 * SIZE * CHUNK
DOCUMENTS = {"one": (TOKENS,), "across chunks": (50, 3, 120, 1, 64, 18), "short": (8,) * 32}
# of the values and of the gradients; bf16 rounds each part and their sum
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class Still(RingAttention):
    """A ring whose other processes are this one: their keys are at hand, and what it sends them is kept."""

    everything: Tensor | None = None  # (n, 2, T/n, KV, D)

    def around(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        assert self.everything is not None
        for step in range(self.size):
            source = (self.rank - step) % self.size
            yield source, own if step == 0 else self.everything[source]


def held(rank: int) -> Tensor:
    """The places in the row of one process's tokens."""
    last = 2 * SIZE - 1 - rank
    return torch.cat([torch.arange(number * CHUNK, (number + 1) * CHUNK) for number in (rank, last)])


@devices
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_parts_of_a_row(
    name: str, window: int | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each process finds for its queries, and the gradients of all keys added up over the processes."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, heads, TOKENS, DIM, generator=generator).to(device, dtype)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in (query, key, value)]
    info = AttentionInfo.documents(DOCUMENTS[name])
    mask = AttentionInfo.masked(info.dense_mask(TOKENS, TOKENS, window, torch.device(device)))
    groups = HEADS // GROUPS
    wide = [exact[0], *(x.repeat_interleave(groups, dim=1) for x in exact[1:])]
    expected = attention(*wide, mask, scale=0.3)
    expected.backward(grad.double())
    if device == "cuda":
        assert choose_kernel(query[0].transpose(0, 1)) == ("flash" if dtype == torch.bfloat16 else "written out")

    both = torch.stack([key[0], value[0]]).transpose(1, 2)  # (2, T, KV, D)
    everything = torch.stack([both[:, held(rank).to(device)] for rank in range(SIZE)])
    of_keys = torch.zeros(both.shape, dtype=torch.float32, device=device)
    parts: list[Tensor] = []

    class Kept:
        """In the place of `Passing`: keeps what is sent on, and nothing arrives."""

        def __init__(self, _: RingAttention, part: Tensor) -> None:
            parts.append(part.clone())
            self._nothing = torch.zeros_like(part)

        def received(self) -> Tensor:
            return self._nothing

    monkeypatch.setattr(ring_module, "Passing", Kept)
    for rank in range(SIZE):
        parts.clear()
        places = held(rank).to(device)
        ring = Still(None, rank, SIZE, DOCUMENTS[name], CHUNK, everything=everything)  # type: ignore[arg-type]
        q, k, v = (x[:, :, places].clone().requires_grad_() for x in (query, key, value))
        output = ring.attend(q, k, v, scale=0.3, sliding_window=window)
        close(output, expected[:, :, places], LIMITS[dtype])
        output.backward(grad[:, :, places])
        assert q.grad is not None
        assert k.grad is not None
        assert v.grad is not None
        assert exact[0].grad is not None
        close(q.grad, exact[0].grad[:, :, places], LIMITS[dtype])
        of_keys[:, places] += torch.stack([k.grad[0], v.grad[0]]).transpose(1, 2).float()
        for step, part in enumerate(parts, 1):
            of_keys[:, held((rank - step) % SIZE).to(device)] += part.float()
    for ours, theirs in zip(of_keys, exact[1:], strict=True):
        assert theirs.grad is not None
        close(ours.transpose(0, 1)[None], theirs.grad, LIMITS[dtype])


def close(ours: Tensor, theirs: Tensor, limit: float) -> None:
    distance = (ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm()
    assert float(distance) < limit
