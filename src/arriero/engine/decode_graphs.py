"""Steps in which every sequence computes one token: of few shapes, so that each is captured once as a CUDA graph and replayed.

A graph repeats the kernels of a step without Python, which otherwise takes longer than the kernels of few rows. Its shape is a
number of rows from a ladder and a width of the block tables; a step with fewer rows is filled up with rows whose results are
cut off. Graphs are captured when a step first has their shape, and share one pool of memory.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arriero.cuda_capture import Capture
from arriero.models.packed_model import PackedModel
from arriero.models.paged_attention import SPARE_BLOCKS, DecodeKernel, DecodeView, Table
from arriero.models.paged_cache import PagedCache

logger = logging.getLogger(__name__)

# With more rows than this the kernels take longer than Python, and a graph is of no use.
MAX_GRAPH_ROWS = 512
# Tables are as wide as for so many tokens, then so many times as many, and so on: of kernels that read all of a table, whose
# every block costs, and of those that read what a sequence has.
READ_WHOLE, READ_IN_PART = (256, 2), (2048, 4)


class DecodeWork(Protocol):
    """One token of a sequence; see `Work`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class _Graph:
    numbers: Tensor
    replay: Callable[[], object]
    hidden: Tensor


def rung(rows: int) -> int:
    """The next number of rows of the ladder: 1, 2, 4, 8, 16, 24, ..., 64, 80, ..., 128, 160, ..., 256, 320, ...

    So there are few graphs, and a step of more than 32 rows is filled up by less than a quarter.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    unit = max(8, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // unit) * unit


class DecodeSteps:
    """Computes such steps, from graphs where they can be captured."""

    def __init__(
        self,
        model: PackedModel,
        cache: PagedCache,
        kernel: DecodeKernel,
        max_blocks: int,
        capture: Capture | None = None,
    ) -> None:
        """
        Args:
            cache: with `SPARE_BLOCKS` more than sequences use.
            max_blocks: of a sequence.
            capture: None where steps are computed as they are, without padding.
        """
        self._model, self._cache, self._kernel = model, cache, kernel
        self._max_blocks, self._capture = max_blocks, capture
        self._packings = model.refresh()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._padding = cache.num_blocks - SPARE_BLOCKS  # the block that rows of padding write to
        for stores in (cache.layers, cache.scales or ()):
            for store in stores:
                store[:, self._padding * cache.block_size :] = 0

    @property
    def kernel(self) -> str:
        """What it attends with."""
        return self._kernel.name

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    @torch.inference_mode()
    def run(self, work: Sequence[DecodeWork]) -> Tensor:
        """The logits of each sequence's one token, (R, vocab_size)."""
        packings = self._model.refresh()
        if packings != self._packings:
            self._packings = packings
            self._graphs.clear()  # they read weights that may be no more
        rows = rung(len(work)) if self._capture is not None and len(work) <= MAX_GRAPH_ROWS else len(work)
        numbers = self._numbers(work, rows)
        padding = rows - len(work)
        self._kernel.plan(
            [*(item.blocks for item in work), *([self._padding] for _ in range(padding))],
            [*(item.start + 1 for item in work), *(1 for _ in range(padding))],
        )
        graph = self._graph(numbers) if self._capture is not None and len(work) <= MAX_GRAPH_ROWS else None
        if graph is not None:
            graph.numbers.copy_(numbers)
            graph.replay()
            hidden = graph.hidden
        else:
            hidden = self._hidden_states(numbers.to(self._cache.device))
        return self._model.lm_head(hidden[: len(work)])

    def _numbers(self, work: Sequence[DecodeWork], rows: int) -> Tensor:
        """Of `Table.of`, on the host."""
        size = self._cache.block_size
        tokens, factor = READ_WHOLE if self._kernel.reads_whole_tables else READ_IN_PART
        width = -(-tokens // size)
        longest = max(item.start // size + 1 for item in work)
        while width < longest:
            width *= factor
        width = max(longest, min(width, self._max_blocks))
        pinned = self._cache.device.type == "cuda"
        numbers = torch.full((rows, 2 + width), self._padding, dtype=torch.int64, pin_memory=pinned)
        numbers[:, :2] = 0
        table = numbers.numpy()
        for row, item in zip(table, work, strict=False):  # behind them the rows of padding
            blocks = array("q", item.blocks[:width])  # a request may hold blocks for what comes later
            row[:2] = item.tokens[0], item.start
            row[2 : 2 + len(blocks)] = blocks
        return numbers

    def _hidden_states(self, numbers: Tensor) -> Tensor:
        """(R, 2 + W) -> (R, hidden_size), by what can be captured."""
        table = Table.of(numbers, self._cache.block_size)
        view = DecodeView(self._cache, table, self._kernel)
        return self._model.hidden_states(table.tokens[None], table.positions[None], view, view)[0]

    def _graph(self, numbers: Tensor) -> _Graph | None:
        """The one of this shape; None if graphs cannot be captured here, which is said once."""
        shape = len(numbers), numbers.shape[1]
        if shape not in self._graphs and self._capture is not None:
            held = numbers.to(self._cache.device, copy=True)
            try:
                replay, hidden = self._capture(lambda: self._hidden_states(held), first=not self._graphs)
            except RuntimeError as error:
                logger.warning("decoding goes on without CUDA graphs: %s", str(error).partition("\n")[0])
                self._capture = None
                self._graphs.clear()
                return None
            self._graphs[shape] = _Graph(held, replay, hidden)
        return self._graphs.get(shape)
