"""Ring attention: its blocks together are the mask of the whole row, with no pair twice; and the option that chooses it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from arriero.config.compatibility import check
from arriero.config.parallel import ParallelOptions
from arriero.errors import ConfigError
from arriero.parallel.ring import blocks_of

DOCUMENTS: dict[str, tuple[int, ...]] = {
    "one": (48,),
    "across chunks": (13, 3, 9, 23),
    "ends at chunks": (6, 12, 6, 24),
    "short": (3, 1, 5, 2, 2, 7, 1, 4, 6, 1, 8, 3, 4, 1),
    "single tokens": (1,) * 48,
}


def whole_mask(documents: tuple[int, ...], window: int | None) -> Tensor:
    """(T, T) int, 1 = attend."""
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
    back = torch.arange(len(document))[:, None] - torch.arange(len(document))
    mask = (back >= 0) & (document[:, None] == document)
    return (mask if window is None else mask & (back < window)).int()


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 20, 100])
def test_every_pair_of_the_mask_is_in_one_block(name: str, size: int, window: int | None) -> None:
    documents = DOCUMENTS[name]
    chunk = 48 // (2 * size)
    found = torch.zeros(48, 48, dtype=torch.int32)
    held = [
        [*range(r * chunk, (r + 1) * chunk), *range((2 * size - 1 - r) * chunk, (2 * size - r) * chunk)]
        for r in range(size)
    ]
    for rank in range(size):
        for source, blocks in enumerate(blocks_of(documents, chunk, rank, size, window)):
            for block in blocks:
                for queries, keys in block.documents():
                    rows = torch.tensor(held[rank])[block.queries][queries]
                    columns = torch.tensor(held[source])[block.keys][keys]
                    seen = block.seen(len(rows), len(columns), rows.device)
                    if seen is None:
                        ones = torch.ones(len(rows), len(columns), dtype=torch.bool)
                        seen = ones.tril() if block.causal else ones
                    assert seen.any(dim=1).all()  # no query without a key: its softmax would be 0/0
                    found[rows[:, None], columns] += seen.int()
    assert torch.equal(found, whole_mask(documents, window))


@pytest.mark.parametrize("size", [2, 4])
def test_a_process_meets_each_other_process_in_as_many_pairs(size: int) -> None:
    """Of one long document: so that no process waits for another in any step."""
    chunk = 8
    pairs = [
        [
            sum(sum(b.lengths) * sum(b.key_lengths) for b in blocks if not b.causal)
            for blocks in blocks_of((2 * size * chunk,), chunk, rank, size, None)
        ]
        for rank in range(size)
    ]
    for rank in range(size):
        assert pairs[rank] == [chunk * chunk * (1 if source == rank else 2) for source in range(size)]


def test_what_nobody_sees_is_no_block() -> None:
    blocks = blocks_of((4,) * 12, 12, 1, 2, None)
    assert blocks[0] == ()
    assert list(accumulate(blocks[1][0].lengths))[-1] == 24
    assert blocks_of((48,), 12, 0, 2, 1)[1] == ()


def test_auto_is_a_ring_on_cuda_only() -> None:
    two = ParallelOptions(context_parallel_degree=2).layout(2)
    assert [two.has_ring(device) for device in ("cpu", "cuda")] == [False, True]
    for method in ("gather", "ring"):
        layout = ParallelOptions(context_parallel_degree=2, context_parallel_method=method).layout(2)
        assert [layout.has_ring(device) for device in ("cpu", "cuda")] == [method == "ring"] * 2
    assert not ParallelOptions(context_parallel_method="ring").layout(1).has_ring("cpu")


def test_a_method_without_several_processes_has_no_effect() -> None:
    given = frozenset({"context_parallel_method", "context_parallel_degree"})
    warnings = check([ParallelOptions(context_parallel_method="ring")], given)
    assert warnings == ["--context_parallel_method has no effect without --context_parallel_degree above 1"]
    assert check([ParallelOptions(context_parallel_method="ring", context_parallel_degree=2)], given) == []


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_parallel_method"):
        ParallelOptions(context_parallel_method="rings")
