"""Scaled dot-product attention: what may attend to what, and one function with several backends.

Every backend is tested against "reference", which writes the softmax out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["sdpa", "repeated", "varlen", "reference"]
T = TypeVar("T")

try:
    from torch.nn.attention import varlen
except ImportError:  # a torch without it; documents then go through SDPA
    HAS_VARLEN = False
else:
    # Earlier torch has it with fewer arguments: without windows and grouped heads it is of no use here.
    HAS_VARLEN = {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """Which keys each query attends to. Build it by `causal`, `documents`, `masked` or `padded`, once a batch.

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

    def positions(self, size: int, device: torch.device) -> Tensor:
        """Default positions (1, S) int64: counted in each document, else 0 to S-1."""
        if self.kind != "documents":
            return torch.arange(size, device=device)[None]

        def build() -> Tensor:
            spans = []
            for document, (q, k) in enumerate(zip(self.lengths, self.kv_lengths, strict=True)):
                parts = self.parts(document)
                spans += branch_positions(parts, device) if parts else [torch.arange(k - q, k, device=device)]
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
                        branching_causal(parts, sliding_window, device)
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
                ("branches", parts, sliding_window, device), lambda: branching_causal(parts, sliding_window, device)
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


def branch_positions(parts: Sequence[int], device: torch.device) -> list[Tensor]:
    """Positions of a beginning and of its continuations, each counted on from the beginning's end."""
    start = parts[0]
    return [torch.arange(start, device=device)] + [torch.arange(start, start + n, device=device) for n in parts[1:]]


def branching_causal(parts: Sequence[int], sliding_window: int | None, device: torch.device) -> Tensor:
    """(S, S) bool: causal inside the beginning and inside each continuation, which also sees the beginning."""
    position = torch.cat(branch_positions(parts, device))
    branch = torch.arange(len(parts), device=device).repeat_interleave(torch.tensor(parts, device=device))
    distance = position[:, None] - position[None]
    mask = (distance >= 0) & ((branch[None] == 0) | (branch[:, None] == branch[None]))
    return mask if sliding_window is None else mask & (distance < sliding_window)


def choose_backend(query: Tensor, info: AttentionInfo) -> Backend:
    """The fastest backend that can do it: SDPA, or for packed half-precision rows on CUDA flash attention with lengths.

    Flash attention wants an Ampere GPU or newer and a head of at most 256, in steps of 8.
    """
    if (
        info.kind == "documents"
        and len(info.lengths) > 1
        and not info.branches
        and _takes_lengths(query.device, query.dtype, query.shape[-1])
    ):
        return "varlen"
    return "sdpa"


def _takes_lengths(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and HAS_VARLEN
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def document_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What packed documents are attended by on a device, in words."""
    if _takes_lengths(device, dtype, head_dim):
        return "flash with lengths"
    if device.type == "cuda":
        return "SDPA, packed rows with a mask (flash with lengths needs bf16 or fp16, an Ampere GPU and a torch that has it)"
    return "SDPA"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    info: AttentionInfo,
    *,
    scale: float,
    sliding_window: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(q k^T * scale, masked) v with grouped heads.

    Args:
        query: (B, H, Sq, D).
        key, value: (B, KV, Skv, D); H is a multiple of KV, and head h reads group h // (H / KV).
        info: which keys each query attends to.
        scale: the factor on the scores.
        sliding_window: each query sees its own key and at most `sliding_window - 1` before it.
        backend: default `choose_backend`.

    Returns:
        (B, H, Sq, D), laid out so that `.transpose(1, 2)` is contiguous wherever the backend allows.
    """
    if info.kind == "documents":
        return _uncompiled(query, key, value, info, scale, sliding_window, backend)
    return _dispatch(query, key, value, info, scale, sliding_window, backend)


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    info: AttentionInfo,
    scale: float,
    sliding_window: int | None,
    backend: Backend | None,
) -> Tensor:
    match backend or choose_backend(query, info):
        case "reference":
            return _reference(query, key, value, info, scale, sliding_window)
        case "varlen":
            return _varlen(query, key, value, info, scale, sliding_window)
        case "repeated":  # for kernels without grouped heads: on CUDA those that take fp32 or a mask
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
            return _sdpa(query, key, value, info, scale, sliding_window)
        case _:
            return _sdpa(query, key, value, info, scale, sliding_window)


# The lengths of documents differ in every batch: in a compiled layer each new set of them would be compiled anew.
_uncompiled: Callable[..., Tensor] = torch.compiler.disable(_dispatch)  # type: ignore[no-untyped-call]


def _reference(
    query: Tensor, key: Tensor, value: Tensor, info: AttentionInfo, scale: float, sliding_window: int | None
) -> Tensor:
    mask = info.dense_mask(query.shape[2], key.shape[2], sliding_window, query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    # A query that sees nothing has a softmax of 0/0; it yields zeros instead.
    weights = scores.softmax(dim=-1).masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return (weights @ value.float()).to(query.dtype)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, info: AttentionInfo, scale: float, sliding_window: int | None
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if info.kind == "documents" and len(info.lengths) > 1:
        if query.is_cuda:
            mask = info.dense_mask(queries, keys, sliding_window, query.device)
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
        return _sdpa_by_document(query, key, value, info, scale, sliding_window)
    if info.kind == "masked":
        dense = info.dense_mask(queries, keys, sliding_window, query.device)
        return F.scaled_dot_product_attention(query, key, value, dense, scale=scale, enable_gqa=grouped)
    one = info.document_mask(queries, keys, sliding_window, query.device, info.parts(0))
    causal = one is None and queries > 1
    return F.scaled_dot_product_attention(query, key, value, one, is_causal=causal, scale=scale, enable_gqa=grouped)


def _sdpa_by_document(
    query: Tensor, key: Tensor, value: Tensor, info: AttentionInfo, scale: float, sliding_window: int | None
) -> Tensor:
    """One call for each run of documents of one length: no work across documents, and no mask unless a window, a shared
    or a cached beginning needs one."""
    documents = [(q, k, info.parts(i)) for i, (q, k) in enumerate(zip(info.lengths, info.kv_lengths, strict=True))]
    runs = [(document, len(list(same))) for document, same in groupby(documents)]
    # split, not slices: its backward is one concatenation instead of one zero-filled tensor a run.
    pieces = zip(
        torch.split(query, [q * count for (q, _, _), count in runs], dim=2),
        torch.split(key, [k * count for (_, k, _), count in runs], dim=2),
        torch.split(value, [k * count for (_, k, _), count in runs], dim=2),
        strict=True,
    )
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for ((queries, keys, parts), count), run in zip(runs, pieces, strict=True):
        q, k, v = (t[0].view(t.shape[1], count, -1, t.shape[3]).transpose(0, 1) for t in run)
        mask = info.document_mask(queries, keys, sliding_window, query.device, parts)
        causal = mask is None and queries > 1
        output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None].transpose(1, 2) if len(outputs) > 1 else outputs[0][None].transpose(1, 2)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, info: AttentionInfo, scale: float, sliding_window: int | None
) -> Tensor:
    if not HAS_VARLEN or info.kind != "documents" or info.branches:
        raise ValueError(
            "the varlen backend needs documents that do not branch and a torch with torch.nn.attention.varlen"
        )
    query_offsets, key_offsets = info.offsets(query.device)
    # Flash counts the keys before the query's own.
    left = -1 if sliding_window is None else sliding_window - 1
    output = varlen.varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query_offsets,
        key_offsets,
        max(info.lengths),
        max(info.kv_lengths),
        scale=scale,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a tuple only when auxiliary results are asked for
    return output.transpose(0, 1)[None]
