"""Scaled dot-product attention: one function with several backends.

Every backend is tested against "reference", which writes the softmax out.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from arriero.models import onednn_attention
from arriero.models.attention_info import AttentionInfo
from arriero.models.products import prefers_onednn
from arriero.models.uncompiled import uncompiled
from arriero.onednn import onednn_is_faster

__all__ = [
    "AttentionInfo",
    "Backend",
    "attention",
    "choose_backend",
    "document_kernel",
    "kernels_for_any_shape",
    "put_before",
    "takes_lengths",
]

Backend = Literal["sdpa", "repeated", "varlen", "reference"]

HAS_VARLEN = _SAYS_GROUPED = False
if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # only CUDA has the kernel; the import takes a second
    with contextlib.suppress(ImportError):  # a torch without it; documents then go through SDPA
        from torch.nn.attention import varlen

        # Earlier torch has it with fewer arguments: without windows it is of no use here. That of torch 2.11 takes grouped
        # heads as its kernels do, without being told.
        _known = inspect.signature(varlen.varlen_attn).parameters.keys()
        HAS_VARLEN, _SAYS_GROUPED = {"scale", "window_size"} <= _known, "enable_gqa" in _known


def choose_backend(query: Tensor, info: AttentionInfo) -> Backend:
    """The fastest backend that can do it: SDPA, or for packed half-precision rows on CUDA flash attention with lengths.

    Flash attention wants an Ampere GPU or newer and a head of at most 256, in steps of 8.
    """
    if (
        info.kind == "documents"
        and len(info.lengths) > 1
        and not info.branches
        and takes_lengths(query.device, query.dtype, query.shape[-1])
    ):
        return "varlen"
    return "sdpa"


def takes_lengths(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is flash attention over packed documents for a device, a number format and a head's size."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and HAS_VARLEN
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def kernels_for_any_shape(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where shapes differ from call to call: on a GPU all of SDPA's kernels but cuDNN's, which torch prefers on Hopper.

    It makes a plan for each new shape, for which an H200 waited 0.6 s (torch 2.11); the others are as fast there.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return cast("contextlib.AbstractContextManager[None]", sdpa_kernel(kernels))


def document_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What packed documents are attended by on a device, in words."""
    if takes_lengths(device, dtype, head_dim):
        return "flash with lengths"
    if device.type == "cuda":
        return "SDPA, packed rows with a mask (flash with lengths needs bf16 or fp16, an Ampere GPU and a torch that has it)"
    if device.type == "cpu" and dtype == torch.float32 and onednn_is_faster():
        return f"SDPA, of {onednn_attention.LEAST_QUERIES} tokens and more by oneDNN"
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
    if info.kind == "documents" or info.prefix:
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
_uncompiled = uncompiled(_dispatch)


@uncompiled
def put_before(prefix: Tensor, own: Tensor, info: AttentionInfo) -> Tensor:
    """The keys or values to attend over, with a prefix before those of each document, or of each row.

    Args:
        prefix: (KV, P, D).
        own: (B, KV, S, D), of the tokens.
        info: `with_prefix(P)`.

    Returns:
        (B, KV, P + S, D), or (1, KV, N P + S, D) for N documents.
    """
    before = prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1)
    pieces = torch.split(own, list(info.lengths), dim=2) if info.kind == "documents" else (own,)
    return torch.cat([part for piece in pieces for part in (before, piece)], dim=2)


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
    if info.kind == "documents" and (len(info.lengths) > 1 or info.branches):
        if query.is_cuda:
            mask = info.dense_mask(queries, keys, sliding_window, query.device)
            with kernels_for_any_shape(query.device):
                return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
        return _sdpa_by_document(query, key, value, info, scale, sliding_window)
    if info.kind == "masked":
        dense = info.dense_mask(queries, keys, sliding_window, query.device)
        return F.scaled_dot_product_attention(query, key, value, dense, scale=scale, enable_gqa=grouped)
    one = info.document_mask(queries, keys, sliding_window, query.device, info.parts(0))
    causal = one is None and queries > 1
    if causal and _by_onednn(query, value):
        return onednn_attention.causal_attention(query, key, value, scale)
    return F.scaled_dot_product_attention(query, key, value, one, is_causal=causal, scale=scale, enable_gqa=grouped)


def _by_onednn(query: Tensor, value: Tensor) -> bool:
    """Whether oneDNN's products serve causal queries (B, H, S, D) better than torch's kernel.

    Under autocast queries are fp32, values are not, and torch's kernel makes them alike.
    """
    alike = query.dtype == value.dtype and not torch.is_autocast_enabled("cpu")
    takes = prefers_onednn() and alike and onednn_attention.takes(query, query.shape[2])
    return takes and not torch.compiler.is_compiling()


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
        if parts and apart_is_cheaper(parts, keys - queries):
            output = _branch_by_branch(q, k, v, info, parts, scale, sliding_window)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            continue
        mask = info.document_mask(queries, keys, sliding_window, query.device, parts)
        causal = mask is None and queries > 1
        if causal and _by_onednn(q, v):
            output = onednn_attention.causal_attention(q, k, v, scale)
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None].transpose(1, 2) if len(outputs) > 1 else outputs[0][None].transpose(1, 2)


def apart_is_cheaper(parts: Sequence[int], prefix: int = 0) -> bool:
    """Whether to attend to each part of a branching document by itself, or by one call with a mask over all.

    A call more costs about as much as 2,000 pairs of a query and a key, forward and backward (2 threads, 9 heads of 64).
    """
    beginning, *continuations = parts
    together = sum(parts) * (prefix + sum(parts))
    apart = beginning * (prefix + beginning) + sum(own * (prefix + beginning + own) for own in continuations)
    return together > apart + 2000 * len(continuations)


def _branch_by_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    info: AttentionInfo,
    parts: Sequence[int],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Documents (N, H, S, D) that branch alike: the beginning by itself, then each continuation over it and its own."""
    beginning, *continuations = parts
    held = key.shape[2] - query.shape[2] + beginning  # with the keys of a prefix
    queries = torch.split(query, list(parts), dim=2)
    keys, values = (torch.split(t, [held, *continuations], dim=2) for t in (key, value))
    outputs = []
    for part, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if part:
            k, v = torch.cat((keys[0], k), dim=2), torch.cat((values[0], v), dim=2)
        mask = info.document_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        causal = mask is None and q.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped))
    return torch.cat(outputs, dim=2)


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
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _SAYS_GROUPED else {}
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
        **grouped,
    )
    assert isinstance(output, Tensor)  # a tuple only when auxiliary results are asked for
    return output.transpose(0, 1)[None]
