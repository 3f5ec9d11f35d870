"""How much memory there is for keys and values, measured, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arriero.engine.machine_memory import free_memory
from arriero.models.config import LlamaConfig
from arriero.models.kv_format import KVFormat
from arriero.models.paged_cache import PagedCache

# The share of the free memory that keys and values may take.
CACHE_MEMORY_SHARE = 0.4
# A GPU's memory is for nobody else: of it they take more, as long as this many bytes are left for what a step computes.
GPU_MEMORY_SHARE = 0.9
GPU_STEP_BYTES = 2**30


@dataclass(frozen=True)
class KVMemory:
    """What a process can hold.

    Attributes:
        bytes: for keys and values.
        token_bytes: that a token takes, in all layers that this process holds.
        format: of the numbers, by its name.
        free: bytes of memory that were free when it was measured.
    """

    bytes: int
    token_bytes: int
    format: str
    free: int

    @classmethod
    def measure(
        cls,
        config: LlamaConfig,
        dtype: torch.dtype,
        kv_dtype: str,
        device: torch.device,
        share: float | None = None,
    ) -> KVMemory:
        """Of the memory that is free now.

        Args:
            dtype, kv_dtype: see `PagedCache`.
            share: of the free memory, above 0 and at most 1; default: see `default_bytes`.
        """
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        room = default_bytes(free, device.type) if share is None else int(free * share)
        token = PagedCache.bytes_of_block(config, 1, dtype, kv_dtype)
        return cls(room, token, KVFormat.of(kv_dtype, dtype).name, free)

    @property
    def tokens(self) -> int:
        """How many tokens fit."""
        return self.bytes // self.token_bytes

    def text(self, context: int) -> str:
        """A line for people.

        Args:
            context: tokens of the longest request.
        """
        share = self.bytes / self.free
        return (
            f"keys and values: {self.token_bytes:,} bytes a token ({self.format}); {self.tokens:,} tokens fit into "
            f"{self.bytes / 1e9:,.1f} GB ({share:.0%} of the free memory), which is {self.tokens / context:,.1f} "
            f"requests of {context:,} tokens, the whole context"
        )


def default_bytes(free: int, device_type: str) -> int:
    """What keys and values may take of so many free bytes, unless told.

    Args:
        device_type: "cuda" or "cpu".
    """
    least = int(free * CACHE_MEMORY_SHARE)
    return max(least, int(free * GPU_MEMORY_SHARE) - GPU_STEP_BYTES) if device_type == "cuda" else least
