"""Keys and values in blocks, so that many sequences of any length share one memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.models.attention import attention, takes_lengths
from arriero.models.attention_info import AttentionInfo, lower_right_causal
from arriero.models.cache import AttendingView
from arriero.models.config import LlamaConfig
from arriero.models.kv_format import KVFormat
from arriero.models.onednn_attention import attend, takes
from arriero.onednn import onednn_is_faster

# Queries of one call that needs a mask: it then computes few of the scores that the mask forbids.
MASKED_QUERIES = 256
# Keys and values of so many tokens are copied at a time for one call of many sequences; of one sequence, all.
COPIED_TOKENS = 32768


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

    def pieces(self, number: int, window: int | None, by_onednn: bool) -> list[_Piece]:
        """How its tokens attend, call by call.

        Args:
            by_onednn: by `onednn_attention`, if they are causal.
        """
        causal = self.count > 1 and (window is None or window >= self.end)
        if causal and (self.start == 0 or by_onednn):
            return [_Piece(number, self.count, 0, self.end, masked=False, by_onednn=by_onednn)]
        found = []
        for start in range(self.start, self.end, MASKED_QUERIES):
            end = min(start + MASKED_QUERIES, self.end)
            first = max(0, start - window + 1) if window is not None else 0
            found.append(_Piece(number, end - start, first, end, masked=end - start > 1))
        return found


@dataclass(frozen=True)
class _Piece:
    """Queries of one call, the last positions before `end`.

    Attributes:
        number: of the run.
        first, end: the keys that any of them sees.
        masked: whether not all of them see all of these, and causality alone does not say which.
        by_onednn: by `onednn_attention`.
    """

    number: int
    queries: int
    first: int
    end: int
    masked: bool
    by_onednn: bool = False


class PagedCache:
    """Blocks of `block_size` tokens for every layer; who holds which is not known here.

    A head's keys of neighbouring blocks lie one after the other: a sequence whose blocks are neighbours is read where it is,
    without a copy.

    Attributes:
        format: how their numbers are held.
        layers: of each layer, the keys and, behind them, the values of every slot, as they are stored: (2 KV, slots, D).
        scales: of each layer, (2 KV, slots) fp32, where the format has such; else None.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
    ) -> None:
        """
        Args:
            dtype: of the model that computes.
            kv_dtype: how keys and values are held, see `KVFormat.of`.

        Raises:
            ConfigError: an unknown `kv_dtype`.
        """
        self.format = KVFormat.of(kv_dtype, dtype)
        self.block_size, self.num_blocks = block_size, num_blocks
        self.device = torch.device(device)
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2 * heads, num_blocks * block_size, config.head_dim)
        # Not zeros: nothing is read that was not written, and memory that is not touched is not taken.
        store = torch.empty(shape, dtype=self.format.stored, device=self.device)
        self.keys, self.values = store[:, :heads], store[:, heads:]
        self.layers = store.unbind(0)
        scales = torch.empty(shape[:-1], dtype=torch.float32, device=self.device) if self.format.scaled else None
        self.scales = scales.unbind(0) if scales is not None else None

    @staticmethod
    def bytes_of_block(config: LlamaConfig, block_size: int, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
        """What a block takes in all layers, scales included; see the arguments of `PagedCache`."""
        head = KVFormat.of(kv_dtype, dtype).bytes_of_head(config.head_dim)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * block_size * head

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
        for layer, key in keys.items():
            codes, scales = self.format.encode(torch.cat((key, values[layer])))
            stores = [(self.layers[layer], codes)]
            if self.scales is not None and scales is not None:
                stores.append((self.scales[layer], scales))
            for store, given in stores:
                for part, piece in zip(ranges, torch.split(given, sizes, dim=1), strict=True):
                    store[:, part.start : part.stop] = piece

    def view(self, runs: Sequence[Run]) -> PagedView:
        """For a forward pass over the new tokens of these sequences, packed into one row."""
        return PagedView(self, list(runs))


class PagedView(AttendingView):
    """Stores the new tokens of packed sequences and lets each attend over all of its own.

    In half precision on a GPU all do so in one call of flash attention with lengths, else each by itself.

    Attributes:
        attention: what they are to the model: documents of which the cache holds the beginnings.
        positions: (1, T) int64.
    """

    def __init__(self, cache: PagedCache, runs: list[Run]) -> None:
        self._cache, self._runs = cache, runs
        self.attention = AttentionInfo.documents([run.count for run in runs], [run.end for run in runs])
        positions = [position for run in runs for position in range(run.start, run.end)]
        self.positions = torch.tensor([positions], device=cache.device)
        new = [part for run in runs for part in cache.slots(run.blocks, run.start, run.end)]
        # one range is written as a slice, single tokens faster by their numbers
        self._slice = new[0] if len(new) == 1 and len(new[0]) > 1 else None
        slots = [] if self._slice is not None else [slot for part in new for slot in part]
        self._new = torch.tensor(slots, dtype=torch.long, device=cache.device)
        self._held = [cache.slots(run.blocks, 0, run.end) for run in runs]
        self._groups: list[_Group] | None = None
        self._pieces: dict[int | None, list[_Piece]] = {}  # by the window
        self._views: dict[tuple[int, int, int], tuple[Sequence[Tensor], Sequence[Tensor]]] = {}
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
        new = torch.cat((key[0], value[0])).transpose(0, 1)
        packed = self.attend_packed(
            query[0].transpose(0, 1), new, layer=layer, scale=scale, sliding_window=sliding_window
        )
        return packed.transpose(0, 1)[None]

    def attend_packed(
        self, query: Tensor, new: Tensor, *, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """A layer's output, (T, H, D).

        Args:
            query: (T, H, D).
            new: (T, 2 KV, D), the keys and, behind them, the values.
            scale, sliding_window: see `attention`.
        """
        codes, scales = self._cache.format.encode(new)
        self._write(self._cache.layers[layer], codes)
        if self._cache.scales is not None and scales is not None:
            self._write(self._cache.scales[layer], scales)
        if takes_lengths(query.device, query.dtype, query.shape[-1]):
            return self._attend_by_lengths(query, new, layer, scale, sliding_window)
        return self._attend_by_pieces(query, layer, scale, sliding_window)

    def _attend_by_lengths(
        self, query: Tensor, new: Tensor, layer: int, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Many sequences in one call, over a copy of what the cache holds of them; see `attend_packed`."""
        if self._groups is None:
            self._groups = list(_groups(self._runs, self._held, self._cache.device))
        outputs = []
        for group in self._groups:
            keys, values = group.keys_and_values(self._cache, layer, new, query.dtype)
            queries, window = query[group.rows].transpose(0, 1)[None], sliding_window
            found = attention(queries, keys, values, group.info, scale=scale, sliding_window=window, backend="varlen")
            outputs.append(found[0].transpose(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()

    def _attend_by_pieces(self, query: Tensor, layer: int, scale: float, sliding_window: int | None) -> Tensor:
        """Sequence by sequence, each read where it lies if that can be; see `attend_packed`."""
        heads, size = query.shape[1:]
        groups, outputs = 2 * heads // len(self._cache.layers[layer]), []
        if sliding_window not in self._pieces:
            pieces = []
            for i, run in enumerate(self._runs):
                pieces += run.pieces(i, sliding_window, onednn_is_faster() and takes(query, run.count))
            self._pieces[sliding_window] = pieces
        pieces = self._pieces[sliding_window]
        for piece, part in zip(pieces, torch.split(query, [piece.queries for piece in pieces]), strict=True):
            keys, values = self._keys_and_values(piece, layer, query.dtype)
            if piece.queries == 1:
                # a group's heads are as good as queries of one head, and no kernel needs to know of groups
                own = part.reshape(1, -1, groups, size)
                attended = F.scaled_dot_product_attention(own, keys, values, scale=scale).reshape(1, heads, size)
            elif piece.by_onednn:
                attended = attend(part.transpose(0, 1), keys[0], values[0], scale)
            else:
                attended = F.scaled_dot_product_attention(
                    part.transpose(0, 1)[None],
                    keys,
                    values,
                    self._mask(piece.queries, piece.end - piece.first, sliding_window, query.dtype)
                    if piece.masked
                    else None,
                    is_causal=not piece.masked,
                    scale=scale,
                    enable_gqa=groups > 1,
                )[0].transpose(0, 1)
            outputs.append(attended)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()

    def _write(self, store: Tensor, new: Tensor) -> None:
        """Put (T, 2 KV, ...) of the new tokens into their slots, of a store (2 KV, slots, ...)."""
        if self._slice is not None:
            store[:, self._slice.start : self._slice.stop] = new.transpose(0, 1)
        else:
            store.index_copy_(1, self._new, new.transpose(0, 1))

    def _keys_and_values(self, piece: _Piece, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those that a piece sees, (1, KV, S, D) each: views where they lie in one run as they are needed, else copies."""
        cache, held = self._cache, self._held[piece.number]
        if len(held) == 1 and not cache.format.scaled and cache.format.dtype == dtype:
            # a view of all layers costs as much as one of each
            place = piece.number, piece.first, piece.end
            if place not in self._views:
                begin, end = held[0].start + piece.first, held[0].start + piece.end
                keys, values = (store[:, None, :, begin:end].unbind(0) for store in (cache.keys, cache.values))
                self._views[place] = keys, values
            all_keys, all_values = self._views[place]
            return all_keys[layer], all_values[layer]
        gathered = _gather(cache.layers[layer], held, piece.first, piece.end)
        scales = _gather(cache.scales[layer], held, piece.first, piece.end) if cache.scales is not None else None
        gathered = cache.format.decode(gathered, scales, dtype)
        heads = len(gathered) // 2
        return gathered[None, :heads], gathered[None, heads:]

    def _mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(queries, keys), added to the scores."""
        found = self._masks.get((queries, keys, window))
        if found is None:
            seen = lower_right_causal(queries, keys, window, self._cache.device)
            found = torch.zeros(queries, keys, dtype=dtype, device=self._cache.device).masked_fill_(~seen, -math.inf)
            self._masks[queries, keys, window] = found
        return found


@dataclass(frozen=True)
class _Group:
    """Sequences that attend in one call.

    Attributes:
        rows: of the packed queries.
        info: they are its documents.
        slots: that hold their keys.
        fresh: all of these are new.
    """

    rows: slice
    info: AttentionInfo
    slots: Tensor
    fresh: bool

    def keys_and_values(self, cache: PagedCache, layer: int, new: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of the sequences end to end, (1, KV, sum of S, D) each.

        Args:
            new: see `PagedView.attend_packed`.
        """
        if self.fresh and not cache.format.scaled and cache.format.dtype == dtype:
            numbers = new[self.rows].transpose(0, 1)
        else:
            codes = cache.layers[layer].index_select(1, self.slots)
            scales = cache.scales[layer].index_select(1, self.slots) if cache.scales is not None else None
            numbers = cache.format.decode(codes, scales, dtype)
        keys, values = numbers[None].chunk(2, dim=1)
        return keys, values


def _groups(runs: Sequence[Run], held: Sequence[Sequence[range]], device: torch.device) -> Iterator[_Group]:
    """Sequences beside each other, as many as `COPIED_TOKENS` allows, or one.

    Args:
        held: where each one's keys lie.
    """
    first = at = 0
    while first < len(runs):
        last, tokens = first + 1, runs[first].end
        while last < len(runs) and tokens + runs[last].end <= COPIED_TOKENS:
            tokens += runs[last].end
            last += 1
        some = runs[first:last]
        count = sum(run.count for run in some)
        slots = [torch.arange(part.start, part.stop) for ranges in held[first:last] for part in ranges]
        info = AttentionInfo.documents([run.count for run in some], [run.end for run in some])
        yield _Group(slice(at, at + count), info, torch.cat(slots).to(device), not any(run.start for run in some))
        first, at = last, at + count


def _gather(store: Tensor, ranges: Sequence[range], first: int, end: int) -> Tensor:
    """(heads, end - first, ...) of one layer: of a sequence in these ranges, from one position to another."""
    parts, at = [], 0
    for part in ranges:
        begin, stop = max(first - at, 0), min(end - at, len(part))
        if begin < stop:
            parts.append(store[:, part.start + begin : part.start + stop])
        at += len(part)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
