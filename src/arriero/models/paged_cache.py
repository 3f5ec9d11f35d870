"""Keys and values in blocks, so that many sequences of any length share one memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.models.attention_info import AttentionInfo, lower_right_causal
from arriero.models.cache import AttendingView
from arriero.models.config import LlamaConfig


@dataclass(frozen=True)
class Run:
    """New tokens of one sequence, and where the cache holds it.

    Attributes:
        start: the position of the first of them.
        count: how many.
        blocks: of the sequence, at least up to its last new token.
    """

    start: int
    count: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.count


class PagedCache:
    """Blocks of `block_size` tokens for every layer; who holds which is not known here.

    A head's keys of neighbouring blocks lie one after the other: a sequence whose blocks are neighbours is read where it is,
    without a copy.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.device = torch.device(device)
        shape = (config.num_hidden_layers, config.num_key_value_heads, num_blocks * block_size, config.head_dim)
        # Not zeros: nothing is read that was not written, and memory that is not touched is not taken.
        self.keys = torch.empty(shape, dtype=dtype, device=self.device)
        self.values = torch.empty(shape, dtype=dtype, device=self.device)

    @staticmethod
    def bytes_of_block(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
        """What a block takes in all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_size * dtype.itemsize

    def slots(self, blocks: Sequence[int], start: int, end: int) -> list[range]:
        """Where a sequence's tokens from `start` to `end` lie: as few ranges as there are."""
        size = self.block_size
        found: list[range] = []
        at = start
        while at < end:
            block, offset = blocks[at // size], at % size
            length = min(size - offset, end - at)
            first = block * size + offset
            if found and found[-1].stop == first:
                found[-1] = range(found[-1].start, first + length)
            else:
                found.append(range(first, first + length))
            at += length
        return found

    def put(self, blocks: Sequence[int], start: int, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        """Store keys and values that were not computed from tokens, as a learned prefix's.

        Args:
            start: position of the first.
            keys, values: (KV, P, D) of each layer, by its number.
        """
        length = next(iter(keys.values())).shape[1]
        ranges = self.slots(blocks, start, start + length)
        sizes = [len(part) for part in ranges]
        for store, given in ((self.keys, keys), (self.values, values)):
            for layer, tensor in given.items():
                for part, piece in zip(ranges, torch.split(tensor, sizes, dim=1), strict=True):
                    store[layer, :, part.start : part.stop] = piece

    def view(self, runs: Sequence[Run]) -> PagedView:
        """For a forward pass over the new tokens of these sequences, packed into one row."""
        return PagedView(self, list(runs))


class PagedView(AttendingView):
    """Stores the new tokens of packed sequences and lets each attend over all of its own.

    Attributes:
        attention: what they are to the model: documents of which the cache holds the beginnings.
        positions: (1, T) int64.
    """

    def __init__(self, cache: PagedCache, runs: list[Run]) -> None:
        self._cache, self._runs = cache, runs
        self.attention = AttentionInfo.documents([run.count for run in runs], [run.end for run in runs])
        self.positions = self.attention.positions(sum(run.count for run in runs), cache.device)
        new = [part for run in runs for part in cache.slots(run.blocks, run.start, run.end)]
        self._new = torch.cat([torch.arange(p.start, p.stop) for p in new]).to(cache.device)
        self._held = [cache.slots(run.blocks, 0, run.end) for run in runs]
        self._starts = [0, *accumulate(run.count for run in runs)]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """See `AttendingView`: query (1, H, T, D), key and value (1, KV, T, D) -> (1, H, T, D)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(1, self._new, key[0])
        values.index_copy_(1, self._new, value[0])
        grouped = query.shape[1] != key.shape[1]
        output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # (T, H, D)
        for run, held, start in zip(self._runs, self._held, self._starts[:-1], strict=True):
            skipped, mask = 0, None
            if run.count == 1:
                skipped = max(0, run.end - sliding_window) if sliding_window is not None else 0
            elif run.start or (sliding_window is not None and sliding_window < run.end):
                mask = self._mask(run.count, run.end, sliding_window)
            own = query[:, :, start : start + run.count]
            attended = F.scaled_dot_product_attention(
                own,
                _gather(keys, held, skipped)[None],
                _gather(values, held, skipped)[None],
                mask,
                is_causal=mask is None and run.count > 1,
                scale=scale,
                enable_gqa=grouped,
            )
            output[start : start + run.count] = attended[0].transpose(0, 1)
        return output.transpose(0, 1)[None]

    def _mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        found = self._masks.get((queries, keys, window))
        if found is None:
            found = lower_right_causal(queries, keys, window, self._cache.device)
            self._masks[queries, keys, window] = found
        return found


def _gather(store: Tensor, ranges: Sequence[range], skipped: int) -> Tensor:
    """(KV, S, D) of one layer: a view where the tokens lie in one run, else a copy."""
    parts = []
    for part in ranges:
        if skipped >= len(part):
            skipped -= len(part)
            continue
        parts.append(store[:, part.start + skipped : part.stop])
        skipped = 0
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
