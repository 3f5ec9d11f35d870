"""What a forward pass sees of keys and values beside those that it computes: of earlier tokens, or of other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor


class KVCacheView(Protocol):
    """A view that adds its keys and values to those of the forward pass."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take one layer's new keys and values, (B, KV, S, D) each; return those to attend over, (B, KV, Skv, D)."""
        ...


class AttendingView(ABC):
    """A view that attends for itself, because its keys and values are never all in one place."""

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """A layer's output (B, H, S, D) for new queries (B, H, S, D), keys and values (B, KV, S, D); see `attention`."""


CacheView = KVCacheView | AttendingView
