"""What an engine asks of a model: one interface for torch models and exported bundles. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from arriero.engine.request_adapters import AdapterPool

    # (rows, vocab_size). The engine itself only takes some of the rows; whatever else is done with them is the sampler's.
    Logits: TypeAlias = torch.Tensor | npt.NDArray[np.float32]

Library = Literal["torch", "numpy"]
NO_ADAPTER = 0  # the number of none


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step.

    Attributes:
        tokens: to compute, (count) ids.
        start: the position of the first.
        blocks: the sequence's block table.
        logits: of how many of the last of them logits are wanted.
        adapter: the number of the adapter that it uses, in the runner's pool.
        salt: of the request: a runner that reuses computed beginnings by itself does so only among equal ones.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int
    adapter: int = NO_ADAPTER
    salt: bytes = b""


class Runner(Protocol):
    """A model with a key-value cache in blocks.

    Attributes:
        num_blocks, block_size: of the cache.
        vocab_size: ids are below it.
        context: positions that the model has, less those of a prefix.
        prefix_length: learned keys and values that come before every sequence; they take the first positions of its blocks.
        reuses: whether what one sequence computed can serve another that begins alike.
        recalled: of each work of the last run, how many of its tokens needed no computing, where a runner reuses beginnings by
            itself; empty where it does not.
        adapters: that requests can name; None where there are none.
        library: whose arrays the logits are; it decides which sampler draws from them.
        device: of the logits.
    """

    num_blocks: int
    block_size: int
    vocab_size: int
    context: int
    prefix_length: int
    reuses: bool

    @property
    def recalled(self) -> Sequence[int]: ...
    @property
    def adapters(self) -> AdapterPool | None: ...
    @property
    def library(self) -> Library: ...
    @property
    def device(self) -> torch.device | str: ...

    def run(self, work: Sequence[Work]) -> Logits:
        """Compute and store; returns the wanted logits, in the order of the work: (sum of `logits`, vocab_size)."""
        ...

    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = NO_ADAPTER) -> None:
        """Store the keys and values of these positions of a prefix, the adapter's or the model's own, for a sequence with these
        blocks."""
        ...
