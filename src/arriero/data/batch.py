"""Rows as one tensor: rows of one length as a matrix, others as documents of one packed sequence, without padding.

Rows that begin alike (questions about one passage) can share their beginning: it stands once, its continuations after it.
The loss and its gradient are those of the separate rows; the beginning is computed once instead of once a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.data.sft import IGNORE, Example
from arriero.models.attention import AttentionInfo

# below this many tokens in common, a mask costs more than it saves
MIN_SHARED_TOKENS = 16
PADDING_ID = 0  # in every vocabulary; nothing is learned from it


@dataclass(frozen=True)
class PairedRows:
    """The rows of a batch as pairs: the first is the chosen answer, the second the rejected one of the same prompt, and so on.

    Attributes:
        tokens: labels of every row.
        reference: (pairs, 2) fp32, log-probabilities of the chosen and the rejected answer by the reference model.
    """

    tokens: tuple[int, ...]
    reference: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.tokens) // 2


@dataclass(frozen=True)
class Batch:
    """Rows without padding, unless one was asked for (`pad`, `fitted`, `to_common_shape`).

    Attributes:
        input_ids: (1, T) int64, rows end to end; or (B, S), B rows of one length.
        labels: of the same shape, the token to predict at each position or -100.
        parts: of each document, the tokens of its (shared) beginning and of every continuation; they sum to T. Padding
            is documents of its own.
        rows: number of rows; padding is none.
        row_tokens: tokens of the rows, a shared beginning counted in each: what padding-free separate rows would hold.
        label_tokens: number of labels that are not -100.
        lengths: of rows that `pad` padded, the tokens of each without padding; else empty.
        pairs: which rows are the two answers of a pair, where answers are compared.
    """

    input_ids: Tensor
    labels: Tensor
    parts: tuple[tuple[int, ...], ...]
    rows: int
    row_tokens: int
    label_tokens: int
    lengths: tuple[int, ...] = ()
    pairs: PairedRows | None = None

    @classmethod
    def empty(cls) -> Batch:
        """No row, only a token of padding: for a process that must compute along with others and has nothing to do."""
        padding = torch.full((1, 1), PADDING_ID)
        return cls(padding, torch.full_like(padding, IGNORE), ((1,),), rows=0, row_tokens=0, label_tokens=0)

    @property
    def is_matrix(self) -> bool:
        """Whether every row of the tensor is one document."""
        count, length = self.input_ids.shape
        return self.parts == ((length,),) * count

    def fitted(self, tokens: int) -> Batch:
        """The rows end to end as one sequence (1, tokens), ending in a document of padding where they are fewer tokens.

        Raises:
            ValueError: they are more.
        """
        missing = tokens - self.input_ids.numel()
        if missing < 0:
            raise ValueError(f"{self.input_ids.numel()} tokens do not fit in {tokens}")
        return replace(
            self,
            input_ids=F.pad(self.input_ids.reshape(1, -1), (0, missing), value=PADDING_ID),
            labels=F.pad(self.labels.reshape(1, -1), (0, missing), value=IGNORE),
            parts=self.parts + (((missing,),) if missing else ()),
        )

    def real(self) -> Tensor | None:
        """Which tokens are no padding, bool of the shape of `input_ids`; None where all are."""
        if self.lengths:
            lengths = [*self.lengths, *[0] * (len(self.parts) - len(self.lengths))]  # rows of padding come last
            documents = [torch.arange(size) < length for (size,), length in zip(self.parts, lengths, strict=True)]
            return torch.cat(documents).view(self.input_ids.shape).to(self.input_ids.device)
        left, real = self.row_tokens, 0
        for beginning, *rest in self.parts:
            if left <= 0:  # padding comes last
                break
            real += beginning + sum(rest)
            left -= beginning * max(1, len(rest)) + sum(rest)
        count = self.input_ids.numel()
        if real == count:
            return None
        return (torch.arange(count, device=self.input_ids.device) < real).view(self.input_ids.shape)

    def attention(self) -> AttentionInfo:
        """Which tokens attend to which: every row is causal and alone."""
        if self.is_matrix:
            return AttentionInfo.causal()
        if self.input_ids.shape[0] > 1:
            raise ValueError("rows of several documents must be packed into one sequence")
        return AttentionInfo.branching(self.parts)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        ids, labels = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.labels))
        pairs = self.pairs
        if pairs is not None and pairs.reference is not None:
            pairs = replace(pairs, reference=pairs.reference.to(device, non_blocking=True))
        return replace(self, input_ids=ids, labels=labels, pairs=pairs)


def pack(examples: Sequence[Example], *, share_prefixes: bool = False) -> Batch:
    """The examples as one packed batch, in the order given (rows that begin alike are brought together)."""
    groups = group_by_prefix(examples) if share_prefixes else [(0, [example]) for example in examples]
    return pack_groups(groups)


def pack_groups(groups: Sequence[tuple[int, Sequence[Example]]]) -> Batch:
    """Groups of rows as one packed batch.

    Args:
        groups: of each, how many tokens its rows begin with in common, and the rows.
    """
    examples = [member for _, members in groups for member in members]
    ids: list[int] = []
    labels: list[int] = []
    parts: list[tuple[int, ...]] = []
    for shared, members in groups:
        ids += members[0].input_ids[:shared]
        labels += members[0].labels[:shared]
        for member in members:
            ids += member.input_ids[shared:]
            labels += member.labels[shared:]
        lengths = [member.length - shared for member in members]
        parts.append((shared, *lengths) if shared else (lengths[0],))
    target = torch.tensor(labels)
    return Batch(
        input_ids=torch.tensor(ids).unsqueeze(0),
        labels=target.unsqueeze(0),
        parts=tuple(parts),
        rows=len(examples),
        row_tokens=sum(example.length for example in examples),
        label_tokens=int((target != IGNORE).sum()),
    )


def pad(examples: Sequence[Example]) -> Batch:
    """The examples as a matrix (B, S), S the length of the longest, each padded at its end.

    No mask is needed: attention is causal, so that what comes after a row's end is seen by no token of the row, and its
    own outputs carry no label.
    """
    length = max(example.length for example in examples)
    ids = [example.input_ids + [PADDING_ID] * (length - example.length) for example in examples]
    labels = [example.labels + [IGNORE] * (length - example.length) for example in examples]
    return Batch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        parts=((length,),) * len(examples),
        rows=len(examples),
        row_tokens=sum(example.length for example in examples),
        label_tokens=sum(example.label_count for example in examples),
        lengths=tuple(example.length for example in examples),
    )


class LazyBatches:
    """Batches that are made when they are asked for, so that a process makes its own only.

    Args:
        make: the batch of a number, from 0.
    """

    def __init__(self, count: int, make: Callable[[int], Batch]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < self._count:
            raise IndexError(f"batch {number} of {self._count}")
        return self._make(number)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._make, range(self._count))


def packed_batches(examples: Sequence[Example], size: int, *, share_prefixes: bool) -> LazyBatches:
    """All rows in order, `size` rows a batch."""
    return LazyBatches(
        -(-len(examples) // size),
        lambda number: pack(examples[number * size : (number + 1) * size], share_prefixes=share_prefixes),
    )


def to_common_shape(batches: Sequence[Batch], multiple: int = 1) -> list[Batch]:
    """The batches, padded to one shape (B, S) with S a multiple of a number.

    Matrices of one length that suits stay matrices and get rows of padding. Everything else is packed, a document of
    padding at the end: longer rows would be other rows where RoPE depends on the length.
    """
    filled = [batch for batch in batches if batch.rows] or batches
    lengths = {batch.input_ids.shape[1] for batch in filled}
    if len(lengths) == 1 and max(lengths) % multiple == 0 and all(batch.is_matrix for batch in filled):
        count = max(batch.input_ids.shape[0] for batch in filled)
        return [_as_matrix(batch, count, max(lengths)) for batch in batches]
    longest = max((batch.input_ids.numel() for batch in batches), default=0)
    return [batch.fitted(-(-longest // multiple) * multiple) for batch in batches]


def _as_matrix(batch: Batch, count: int, length: int) -> Batch:
    """A matrix of this length, or a batch without rows, as (count, length)."""
    missing = (0, length - batch.input_ids.shape[1], 0, count - batch.input_ids.shape[0])
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, missing, value=PADDING_ID),
        labels=F.pad(batch.labels, missing, value=IGNORE),
        parts=((length,),) * count,
    )


def shared_prefix(first: Example, second: Example) -> int:
    """Tokens with which both begin and that neither learns: at least one token of each stays outside."""
    ours, theirs = first.input_ids, second.input_ids
    common, limit = 0, min(first.prompt_length, second.prompt_length) - 1
    while common < limit:  # by halves: a list is compared faster than its numbers one by one
        middle = (common + limit + 1) // 2
        if ours[common:middle] == theirs[common:middle]:
            common = middle
        else:
            limit = middle - 1
    return common


def group_by_prefix(examples: Sequence[Example]) -> list[tuple[int, list[Example]]]:
    """(shared tokens, rows) of each group; a row that shares nothing is a group of its own with 0 shared tokens."""
    groups: list[tuple[int, list[Example]]] = []
    for example in examples:
        for i, (shared, members) in enumerate(groups):
            common = shared_prefix(members[0], example)
            common = min(common, shared) if len(members) > 1 else common
            # a member that shares much less would shorten the beginning of all
            if common >= MIN_SHARED_TOKENS and common >= 0.75 * shared:
                groups[i] = (common, [*members, example])
                break
        else:
            groups.append((0, [example]))
    return groups
