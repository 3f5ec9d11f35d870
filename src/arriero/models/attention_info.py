"""Which keys each query attends to, told apart from how attention is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """Which keys each query attends to. Build it by `causal`, `documents`, `branching`, `masked` or `padded`, once a batch.

    Masks and offsets derived from it are kept inside, so that all layers share them.
    """

    kind: Literal["causal", "documents", "masked"]
    # documents: queries of each document, and keys of each (more than queries where a cache holds the beginning).
    lengths: tuple[int, ...] = ()
    kv_lengths: tuple[int, ...] = ()
    # documents: for each that branches, its shared beginning and its continuations; () for one that does not.
    branches: tuple[tuple[int, ...], ...] = ()
    # masked: (B, 1, Sq, Skv) bool, True = attend.
    mask: Tensor | None = None
    # masked: (B, Sq) int64, the key index that each query stands at; a sliding window counts back from it.
    query_positions: Tensor | None = None
    # keys before each document's own, or each row's; counted in `kv_lengths`, `mask` and positions, not in `branches`.
    prefix: int = 0
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def causal(cls) -> AttentionInfo:
        """Every row is one sequence. With more keys than queries, the queries are the last positions."""
        return cls("causal")

    @classmethod
    def documents(cls, lengths: Sequence[int], kv_lengths: Sequence[int] | None = None) -> AttentionInfo:
        """One packed row (B == 1) of documents: causal inside each, nothing across.

        Args:
            lengths: tokens of each document, at least 1 each; their sum is S.
            kv_lengths: keys of each document, when part of it is in a cache; its queries are its last positions.

        Raises:
            ValueError: a length below 1, or a document with fewer keys than queries.
        """
        queries = tuple(lengths)
        keys = queries if kv_lengths is None else tuple(kv_lengths)
        if not queries or len(keys) != len(queries) or any(not 1 <= q <= k for q, k in zip(queries, keys, strict=True)):
            raise ValueError(f"documents need lengths of at least 1 and no fewer keys than queries: {queries} {keys}")
        return cls("documents", queries, keys)

    @classmethod
    def branching(cls, parts: Sequence[Sequence[int]]) -> AttentionInfo:
        """One packed row (B == 1) of documents, some of which begin alike and hold that beginning once.

        Args:
            parts: of each document, the tokens of its beginning and of every continuation, in the order they stand. A
                continuation sees the beginning and itself, and its positions count on from the beginning's end.

        Raises:
            ValueError: a part without a token.
        """
        if any(length < 1 for document in parts for length in document):
            raise ValueError(f"every part of a document needs at least one token: {parts}")
        lengths = tuple(sum(document) for document in parts)
        branches = tuple(tuple(document) if len(document) > 2 else () for document in parts)
        return cls("documents", lengths, lengths, branches if any(branches) else ())

    def parts(self, document: int) -> tuple[int, ...]:
        """The beginning and the continuations of a document that branches, () of any other."""
        return self.branches[document] if self.branches else ()

    @classmethod
    def masked(cls, mask: Tensor, query_positions: Tensor | None = None) -> AttentionInfo:
        """An explicit mask, causality included.

        Args:
            mask: (B or 1, 1, Sq, Skv) bool, True = attend. A query that may attend to nothing yields zeros.
            query_positions: (B or 1, Sq) int64, the key index that each query stands at; a sliding window needs it.
                Default: the queries are the last Sq of the Skv keys.

        Raises:
            ValueError: the mask is not boolean or not of four dimensions.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(f"an attention mask must be bool (B, 1, Sq, Skv), got {mask.dtype} {tuple(mask.shape)}")
        return cls("masked", mask=mask, query_positions=query_positions)

    @classmethod
    def padded(cls, attention_mask: Tensor) -> AttentionInfo:
        """A batch of padded rows, causal.

        Args:
            attention_mask: (B, S) bool or int, nonzero = a real token. A padding query attends to itself only.
        """
        real = attention_mask.bool()
        size = real.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=real.device).tril()
        itself = torch.eye(size, dtype=torch.bool, device=real.device)
        return cls.masked((causal & real[:, None, None, :] & real[:, None, :, None]) | itself)

    def with_prefix(self, length: int) -> AttentionInfo:
        """The same after `length` more keys at the start of each document, or of each row where there are none.

        They are earlier tokens as a cache would hold them: positions count on from their end, every query sees them, and a
        sliding window slides past them.
        """
        if length == 0:
            return self

        def build() -> AttentionInfo:
            mask, at = self.mask, self.query_positions
            return replace(
                self,
                kv_lengths=tuple(length + keys for keys in self.kv_lengths),
                mask=None if mask is None else F.pad(mask, (length, 0), value=True),
                query_positions=None if at is None else at + length,
                prefix=self.prefix + length,
                _derived={},
            )

        return self._once(("prefix", length), build)

    def positions(self, size: int, device: torch.device) -> Tensor:
        """Default positions (1, S) int64: counted in each document, else 0 to S-1; a prefix comes first."""
        if self.kind != "documents":
            return torch.arange(self.prefix, self.prefix + size, device=device)[None]

        def build() -> Tensor:
            spans = []
            for document, (q, k) in enumerate(zip(self.lengths, self.kv_lengths, strict=True)):
                parts = self.parts(document)
                at = branch_positions(parts, device, self.prefix) if parts else [torch.arange(k - q, k, device=device)]
                spans += at
            return torch.cat(spans)[None]

        return self._once(("positions", device), build)

    def sequence_lengths(self, device: torch.device) -> Tensor | None:
        """documents: (1, S) int64, the length of the document that each token is of; otherwise None.

        Raises:
            ValueError: a document branches: its beginning is of several lengths.
        """
        if self.kind != "documents":
            return None
        if self.branches:
            raise ValueError("RoPE that depends on the length cannot share a beginning between documents")
        keys, queries = (torch.tensor(lengths, device=device) for lengths in (self.kv_lengths, self.lengths))
        return keys.repeat_interleave(queries)[None]

    def dense_mask(self, queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
        """The whole mask (B or 1, 1, Sq, Skv) bool, True = attend, for any kind and window."""

        def build() -> Tensor:
            if self.kind == "documents":
                whole = torch.zeros(queries, keys, dtype=torch.bool, device=device)
                row = column = 0
                for document, (q, k) in enumerate(zip(self.lengths, self.kv_lengths, strict=True)):
                    parts = self.parts(document)
                    block = (
                        branching_causal(parts, sliding_window, device, self.prefix)
                        if parts
                        else lower_right_causal(q, k, sliding_window, device)
                    )
                    whole[row : row + q, column : column + k] = block
                    row, column = row + q, column + k
                return whole[None, None]
            if self.mask is None:
                return lower_right_causal(queries, keys, sliding_window, device)[None, None]
            if sliding_window is None:
                return self.mask
            index = torch.arange(keys, device=device)
            at = index[keys - queries :][None] if self.query_positions is None else self.query_positions
            return self.mask & (index > (at - sliding_window)[:, None, :, None])

        return self._once(("mask", queries, keys, sliding_window, device), build)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """documents: cumulative lengths of queries and of keys, (N + 1,) int32 each, as flash kernels take them."""

        def build() -> tuple[Tensor, Tensor]:
            query, key = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
                for lengths in (self.lengths, self.kv_lengths)
            )
            return query, key

        return self._once(("offsets", device), build)

    def document_mask(
        self,
        queries: int,
        keys: int,
        sliding_window: int | None,
        device: torch.device,
        parts: tuple[int, ...] = (),
    ) -> Tensor | None:
        """The mask (Sq, Skv) of one document; None where `is_causal` (Sq == Skv) or nothing (Sq == 1) says it all."""
        if parts:
            return self._once(
                ("branches", parts, sliding_window, device),
                lambda: branching_causal(parts, sliding_window, device, self.prefix),
            )
        uncut = sliding_window is None or sliding_window >= keys
        if uncut and queries in (1, keys):
            return None
        return self._once(
            ("document", queries, keys, sliding_window, device),
            lambda: lower_right_causal(queries, keys, sliding_window, device),
        )

    def _once(self, key: Any, build: Callable[[], T]) -> T:
        if key not in self._derived:
            self._derived[key] = build()
        result: T = self._derived[key]
        return result


def lower_right_causal(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """(Sq, Skv) bool: query i stands at key i + Skv - Sq; it sees that one and, of those before, the window's."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    mask = ones.tril(keys - queries)
    return mask if sliding_window is None else mask.triu(keys - queries - sliding_window + 1)


def branch_positions(parts: Sequence[int], device: torch.device, prefix: int = 0) -> list[Tensor]:
    """Positions of a beginning, which stand after a prefix, and of its continuations, each counted on from its end."""
    start = prefix + parts[0]
    return [torch.arange(prefix, start, device=device)] + [
        torch.arange(start, start + n, device=device) for n in parts[1:]
    ]


def branching_causal(parts: Sequence[int], sliding_window: int | None, device: torch.device, prefix: int = 0) -> Tensor:
    """(S, prefix + S) bool: causal inside the beginning and inside each continuation, which also sees the beginning; all
    see the prefix before it."""
    position = torch.cat(branch_positions(parts, device, prefix))
    branch = torch.arange(len(parts), device=device).repeat_interleave(torch.tensor(parts, device=device))
    key_position = torch.cat((torch.arange(prefix, device=device), position))
    key_branch = F.pad(branch, (prefix, 0))  # the prefix is of the beginning
    distance = position[:, None] - key_position[None]
    mask = (distance >= 0) & ((key_branch[None] == 0) | (branch[:, None] == key_branch[None]))
    return mask if sliding_window is None else mask & (distance < sliding_window)
