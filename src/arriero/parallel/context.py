"""Context parallelism: several processes share out every sequence, and attend to each other's keys and values.

The packed row is cut into 2n equal chunks, and process r holds chunks r and 2n - 1 - r: under a causal mask all then have
equal work. Keys and values are gathered before attention, as in Llama 3 (arXiv:2407.21783, section 3.3.2): they are few beside
the queries where heads are grouped, and documents of any lengths need no other attention than one process does. Or they go
around in a ring (`ring.py`), and no process holds more of them than its own and two others'.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.data.batch import Batch
from arriero.models.attention import AttentionInfo
from arriero.models.llama import LayerInputs
from arriero.models.uncompiled import uncompiled
from arriero.parallel import collectives
from arriero.parallel.ring import RingAttention


@dataclass(frozen=True, eq=False)
class ContextShard:
    """One process's two chunks of a batch: its T/n tokens of T.

    Where keys and values are gathered it is the `KVCacheView` of its own forward pass, and keeps nothing: a layer may be
    computed again.

    Attributes:
        input_ids, labels: (1, T/n) int64.
        positions: (1, T/n) int64, counted in each document.
        lengths: (1, T/n) int64, the length of the whole document that each token is of, for RoPE that depends on it.
        attention: of the local queries to the keys that `update` returns.
        label_tokens: labels that are not -100, in all processes together.
        ring: what attends where keys and values are not gathered.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: Tensor
    attention: AttentionInfo
    label_tokens: int
    ring: RingAttention | None
    _group: dist.ProcessGroup
    _size: int
    _key_ranges: tuple[range, ...]  # tokens of the whole row, for each chunk

    @classmethod
    def of(
        cls, batch: Batch, group: dist.ProcessGroup, rank: int, size: int, *, multiple: int = 1, ring: bool = False
    ) -> ContextShard:
        """What process `rank` of `size` computes of a batch that all of them have; rows are packed end to end.

        Args:
            group: the processes that share the batch.
            multiple: what the tokens of each chunk are padded to a multiple of.
            ring: whether keys and values go around instead of being gathered.

        Raises:
            ValueError: documents branch: a beginning that several share cannot be cut.
        """
        if any(len(document) > 1 for document in batch.parts):
            raise ValueError("a sequence with shared beginnings cannot be shared out: pack the rows apart")
        unit = 2 * size * multiple
        batch = batch.fitted(-(-batch.input_ids.numel() // unit) * unit)
        documents = [length for (length,) in batch.parts]
        chunk = batch.input_ids.shape[1] // (2 * size)
        queries: list[int] = []
        keys: list[int] = []
        whole: list[int] = []
        key_ranges = []
        for number in (rank, 2 * size - 1 - rank):
            start, stop = number * chunk, (number + 1) * chunk
            first = stop
            for end, length in zip(accumulate(documents), documents, strict=True):
                begin = end - length
                if begin < stop and end > start:
                    first = min(first, begin)
                    queries.append(min(end, stop) - max(begin, start))
                    keys.append(min(end, stop) - begin)
                    whole.append(length)
            key_ranges.append(range(first, stop))
        attention = AttentionInfo.documents(queries, keys)
        device = batch.input_ids.device
        input_ids, labels = (
            torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
            for chunks in (torch.split(tensor, chunk, dim=1) for tensor in (batch.input_ids, batch.labels))
        )
        lengths = torch.tensor(whole, device=device).repeat_interleave(
            torch.tensor(queries, device=device), output_size=2 * chunk
        )[None]
        positions = attention.positions(2 * chunk, device)
        around = RingAttention(group, rank, size, tuple(documents), chunk) if ring else None
        return cls(
            input_ids,
            labels,
            positions,
            lengths,
            attention,
            batch.label_tokens,
            around,
            group,
            size,
            tuple(key_ranges),
        )

    @property
    def inputs(self) -> LayerInputs:
        """What the decoder layers take besides the hidden states."""
        return LayerInputs(self.positions, self.attention, self.ring or self, self.lengths)

    @uncompiled
    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all processes that the local queries attend to, with gradients.

        Args:
            key, value: (1, KV, T/n, D), of the local tokens.

        Returns:
            (1, KV, Skv, D) each: for each chunk, from the start of the first document in it to its end.
        """
        del layer
        # autocast leaves rotated keys wider than values; attention would round them alike
        both = torch.stack([key.to(value.dtype), value], dim=2).permute(0, 3, 2, 1, 4)  # (1, T/n, 2, KV, D)
        gathered = collectives.enter(both, self._group, split=True)
        halves = gathered.unflatten(1, (2 * self._size, -1)).unbind(1)  # type: ignore[no-untyped-call]
        chunks = [*halves[::2], *reversed(halves[1::2])]  # in the order of the sequence
        size = chunks[0].shape[1]
        pieces = []
        for wanted in self._key_ranges:
            first = wanted.start // size
            pieces += [chunks[first][:, wanted.start - first * size :], *chunks[first + 1 : wanted.stop // size]]
        keys, values = torch.cat(pieces, dim=1).permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values
