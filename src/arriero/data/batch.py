"""Rows as one tensor without padding: rows of one length as a matrix, others as documents of one packed sequence.

Rows that begin alike (questions about one passage) can share their beginning: it stands once, its continuations after it.
The loss and its gradient are those of the separate rows; the beginning is computed once instead of once a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.data.sft import IGNORE, Example
from arriero.models.attention import AttentionInfo

# below this many tokens in common, a mask costs more than it saves
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class Batch:
    """Rows without padding.

    Attributes:
        input_ids: (1, T) int64, rows end to end; or (B, S), B rows of one length.
        labels: of the same shape, the token to predict at each position or -100.
        parts: of each document, the tokens of its (shared) beginning and of every continuation; they sum to T.
        rows: number of rows.
        row_tokens: tokens of the rows, a shared beginning counted in each: what padding-free separate rows would hold.
        label_tokens: number of labels that are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    parts: tuple[tuple[int, ...], ...]
    rows: int
    row_tokens: int
    label_tokens: int

    def attention(self) -> AttentionInfo:
        """Which tokens attend to which: every row is causal and alone."""
        count, length = self.input_ids.shape
        if self.parts == ((length,),) * count:
            return AttentionInfo.causal()
        if count > 1:
            raise ValueError("rows of several documents must be packed into one sequence")
        return AttentionInfo.branching(self.parts)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        ids, labels = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.labels))
        return Batch(ids, labels, self.parts, self.rows, self.row_tokens, self.label_tokens)


def pack(examples: Sequence[Example], *, share_prefixes: bool = False) -> Batch:
    """The examples as one packed batch, in the order given (rows that begin alike are brought together)."""
    groups = group_by_prefix(examples) if share_prefixes else [(0, [example]) for example in examples]
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


def packed_batches(examples: Sequence[Example], size: int, *, share_prefixes: bool) -> Iterator[Batch]:
    """All rows in order, `size` rows a batch."""
    for start in range(0, len(examples), size):
        yield pack(examples[start : start + size], share_prefixes=share_prefixes)


def shared_prefix(first: Example, second: Example) -> int:
    """Tokens with which both begin and that neither learns: at least one token of each stays outside."""
    limit = min(first.prompt_length, second.prompt_length) - 1
    common = 0
    while common < limit and first.input_ids[common] == second.input_ids[common]:
        common += 1
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
