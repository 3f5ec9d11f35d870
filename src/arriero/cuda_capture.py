"""Steps on a GPU that repeat without Python: CUDA graphs, for `engine` and `export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Capture(Protocol):
    """Records a computation."""

    def __call__(self, compute: Callable[[], Tensor], *, first: bool) -> tuple[Callable[[], object], Tensor]:
        """
        Args:
            compute: works on tensors that stay where they are; it is called, also more than once.
            first: no recording of before is held any more.

        Returns:
            What repeats it, and the tensor that then holds its result.
        """
        ...


class CudaCapture:
    """Captures CUDA graphs that share a pool of memory: only one may be replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor], *, first: bool) -> tuple[Callable[[], object], Tensor]:
        """See `Capture`."""
        if first:  # a pool goes with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # what libraries do in their first calls is not to be recorded
                    compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a server's, may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()
        return graph.replay, result
