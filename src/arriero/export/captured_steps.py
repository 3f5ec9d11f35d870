"""Steps of one token a sequence with a program, captured for each shape and repeated without Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.cuda_capture import Capture

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
# Spans are as long as for so many tokens, then twice as many, and so on.
_SHORTEST = 256
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Graph:
    """One shape's.

    Attributes:
        numbers: tokens and starts, (2, B).
        inputs: all that it reads; they have to stay where they are.
        replay: computes.
        logits: what it writes.
    """

    numbers: Tensor
    inputs: Sequence[Tensor]
    replay: Callable[[], object]
    logits: Tensor


class CapturedSteps:
    """The graphs of a session; one for each run of rows and each length.

    Attributes:
        graphs: how many are held.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Tensor]], Tensor],
        weights: Sequence[Tensor],
        caches: Sequence[Tensor],
        span: Tensor,
        capture: Capture,
    ) -> None:
        """
        Args:
            step: see `torch_session.Program`.
            weights, caches, span: its inputs; span as long as a row of the caches.
        """
        self._step, self._weights, self._caches, self._span, self._capture = step, weights, caches, span, capture
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._works = True

    @property
    def graphs(self) -> int:
        """How many are held."""
        return len(self._graphs)

    def run(self, first: int, tokens: Integers, starts: Integers) -> Tensor | None:
        """The logits of one token of each of some neighbouring rows, (B, vocab_size).

        Args:
            first: of the rows.
            tokens, starts: (B).

        Returns:
            None, if steps cannot be captured here, which is said once.
        """
        if not self._works:
            return None
        length = _SHORTEST
        while length <= starts.max():
            length *= 2
        shape = first, len(tokens), min(length, len(self._span))
        numbers = torch.from_numpy(np.stack((tokens, starts)))
        if shape not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))  # the one that was not used for longest
            try:
                self._graphs[shape] = self._captured(numbers.to(self._span.device, copy=True), *shape)
            except RuntimeError as error:
                logger.warning("the bundle runs without CUDA graphs: %s", str(error).partition("\n")[0])
                self._works = False
                self._graphs.clear()
                return None
        graph = self._graphs[shape] = self._graphs.pop(shape)
        graph.numbers.copy_(numbers)
        graph.replay()
        return graph.logits.clone()  # the next one writes there again

    def _captured(self, numbers: Tensor, first: int, rows: int, length: int) -> _Graph:
        inputs = [
            numbers[0, :, None],
            numbers[1],
            self._span[:length],
            torch.arange(rows, device=self._span.device),
            *self._weights,
            *[cache[first : first + rows] for cache in self._caches],
        ]
        replay, logits = self._capture(lambda: self._step(inputs), first=not self._graphs)
        return _Graph(numbers, inputs, replay, logits)
