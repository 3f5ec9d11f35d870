"""Keys and values of earlier tokens, so that a step computes only the new ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig


class KVCacheView(Protocol):
    """What a forward pass sees of a cache."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, (B, KV, S, D) each; return those to attend over, (B, KV, Skv, D)."""
        ...


class AttendingView(ABC):
    """A view that attends for itself, because its keys and values are never all in one place."""

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """A layer's output (B, H, S, D) for new queries (B, H, S, D), keys and values (B, KV, S, D); see `attention`."""


CacheView = KVCacheView | AttendingView


class ContiguousCache:
    """One slot of `max_length` tokens a row and layer; rows are left-aligned, with a length each.

    Learned keys and values that come before all tokens (`begin_with`) count as tokens. `lengths` are Python integers, so that
    scheduling never waits for a device.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.max_length = max_length
        self.lengths: list[int] = [0] * batch
        self.prefix_length = 0
        self._pending: list[int] = []
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        # Zeros and not empty: a masked key has weight 0, and 0 times a NaN of stale memory would be NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    def begin_with(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        """Let every row begin with the same keys and values, before any token; `prefix_length` says how many.

        Args:
            keys, values: (KV, P, D) of each layer, by its number.

        Raises:
            ValueError: a row holds tokens already, or has no room for so many.
        """
        length = next(iter(keys.values())).shape[1]
        if any(self.lengths) or length > self.max_length:
            raise ValueError(f"rows of {self.max_length} tokens that hold {self.lengths} cannot begin with {length}")
        for slots, given in ((self._keys, keys), (self._values, values)):
            for layer, tensor in given.items():
                slots[layer, :, :, :length] = tensor
        self.prefix_length, self.lengths = length, [length] * self.batch

    def prefill(
        self, rows: Sequence[int], lengths: Sequence[int], prefix_lengths: Sequence[int] | None = None
    ) -> PrefillView:
        """A view for one packed row (B == 1) of whole prompts, or of what follows prefixes that rows already hold.

        The rows' lengths are set at once.

        Args:
            rows: the row that each document goes to, each at most once.
            lengths: the new tokens of each document.
            prefix_lengths: how many tokens each row keeps before them (see `copy_prefix`); default 0 each.

        Raises:
            ValueError: a row twice, a prefix longer than its row, or a prompt longer than `max_length`.
        """
        starts = [0] * len(rows) if prefix_lengths is None else list(prefix_lengths)
        if len(set(rows)) != len(rows) or not len(rows) == len(lengths) == len(starts):
            raise ValueError("prefill needs distinct rows, with one length each")
        for row, length, start in zip(rows, lengths, starts, strict=True):
            if start > self.lengths[row]:
                raise ValueError(f"row {row} holds {self.lengths[row]} tokens, fewer than the prefix of {start}")
            if start + length > self.max_length:
                raise ValueError(f"{start + length} tokens do not fit a row of {self.max_length}")
        for row, length, start in zip(rows, lengths, starts, strict=True):
            self.lengths[row] = start + length
        return PrefillView(self._keys, self._values, list(rows), list(lengths), starts)

    def decode(self, rows: Sequence[int] | None = None) -> DecodeView:
        """A view for one new token (B, 1) of each row; call `advance` after the forward pass.

        Args:
            rows: which rows, in the order of the batch; default all, which spares a copy of the cache.

        Raises:
            ValueError: a row is full.
        """
        self._pending = list(range(self.batch)) if rows is None else list(rows)
        full = [row for row in self._pending if self.lengths[row] >= self.max_length]
        if full:
            raise ValueError(f"rows {full} are full: {self.max_length} tokens each")
        keys, values = self._keys[:, : self.batch], self._values[:, : self.batch]
        lengths = [self.lengths[row] for row in self._pending]
        return DecodeView(keys, values, None if rows is None else self._pending, lengths, self.device)

    def decode_mask(self, rows: Sequence[int] | None = None) -> Tensor:
        """(B, 1, 1, Skv) bool: the keys of the next decode step, the new token's included."""
        lengths = self.lengths if rows is None else [self.lengths[row] for row in rows]
        return _decode_mask(torch.tensor(lengths, device=self.device), max(lengths) + 1)

    def advance(self) -> None:
        """Count the token that the last decode step stored."""
        for row in self._pending:
            self.lengths[row] += 1
        self._pending = []

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; row i is then what `rows[i]` was. Dropping rows copies only what moves.

        Raises:
            ValueError: more rows than the cache has room for.
        """
        capacity = self._keys.shape[1]
        if len(rows) > capacity:
            raise ValueError(f"{len(rows)} rows do not fit a cache of {capacity}")
        self._pending = []
        longest = max((self.lengths[row] for row in rows), default=0)
        if all(before < after for before, after in pairwise(rows)):
            # Ascending: every row moves down or stays, so nothing is overwritten before it is read.
            for target, row in enumerate(rows):
                if target != row:
                    length = self.lengths[row]
                    for slots in (self._keys, self._values):
                        slots[:, target, :, :length] = slots[:, row, :, :length]
        else:
            index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
            for slots in (self._keys, self._values):
                slots[:, : len(rows), :, :longest] = slots[:, :, :, :longest].index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]

    def copy_prefix(self, source_row: int, target_row: int, length: int) -> None:
        """Make a row begin with the first `length` tokens of another one; its length becomes `length`.

        Raises:
            ValueError: the source row holds fewer tokens.
        """
        if length > self.lengths[source_row]:
            raise ValueError(f"row {source_row} holds {self.lengths[source_row]} tokens, fewer than {length}")
        if source_row != target_row:
            for slots in (self._keys, self._values):
                slots[:, target_row, :, :length] = slots[:, source_row, :, :length]
        self.lengths[target_row] = length


def _decode_mask(lengths: Tensor, keys: int) -> Tensor:
    """(B, 1, 1, Skv) bool: keys 0 to length, the new token standing at index length."""
    return (torch.arange(keys, device=lengths.device) <= lengths[:, None])[:, None, None, :]


class PrefillView:
    """Stores packed documents; `attention` and `positions` are what the forward pass needs beside it."""

    def __init__(self, keys: Tensor, values: Tensor, rows: list[int], lengths: list[int], starts: list[int]) -> None:
        self._keys, self._values = keys, values
        self._rows, self._lengths, self._starts = rows, lengths, starts
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        self._ends = ends
        self.attention = AttentionInfo.documents(lengths, ends)
        """Documents, each after its own prefix."""
        self.positions = self.attention.positions(sum(lengths), keys.device)
        """(1, S) int64."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCacheView`; key and value are (1, KV, sum of lengths, D)."""
        for slots, new in ((self._keys[layer], key), (self._values[layer], value)):
            for row, start, end, part in zip(
                self._rows, self._starts, self._ends, torch.split(new[0], self._lengths, dim=1), strict=True
            ):
                slots[row, :, start:end] = part
        if not any(self._starts):
            return key, value
        held_keys, held_values = (
            torch.cat([slots[layer, row, :, :end] for row, end in zip(self._rows, self._ends, strict=True)], dim=1)
            for slots in (self._keys, self._values)
        )
        return held_keys[None], held_values[None]


class DecodeView:
    """Stores one token a row; `attention` and `positions` are what the forward pass needs beside it."""

    def __init__(
        self, keys: Tensor, values: Tensor, rows: list[int] | None, lengths: list[int], device: torch.device
    ) -> None:
        self._keys, self._values = keys, values
        self._count = max(lengths) + 1
        at = torch.tensor(lengths, dtype=torch.long, device=device)
        self._at = at
        self._rows = torch.arange(keys.shape[1], device=device) if rows is None else torch.tensor(rows, device=device)
        self._all_rows = rows is None
        self.positions = at[:, None]
        """(B, 1) int64."""
        self.attention = (
            AttentionInfo.causal()  # one query at the end of every row: no mask at all
            if min(lengths) == max(lengths)
            else AttentionInfo.masked(_decode_mask(at, self._count), self.positions)
        )
        """Every key of the own row up to the new one."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCacheView`; key and value are (B, KV, 1, D)."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows, :, self._at] = key[:, :, 0]
        values[self._rows, :, self._at] = value[:, :, 0]
        keys, values = keys[:, :, : self._count], values[:, :, : self._count]
        if self._all_rows:
            return keys, values
        return keys[self._rows], values[self._rows]
