"""What computes an engine's steps where each sequence has a slot, a block as long as the context; without torch.

Where the keys and values of a slot lie is decided here: sequences that go on together are brought side by side, since a batch
is a run of neighbouring rows of one buffer. A row remembers the tokens that it was computed from, also when its sequence has
ended: what a prompt begins with is copied from where it was computed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from arriero.errors import GenerationError
from arriero.export.prefix_file import PrefixArray

# Tokens of one computation: the scores of attention take heads x tokens x length numbers.
MAX_TOKENS = 256
# Sequences that bring at most so many tokens are computed together, each filled up to the most of them.
SHORT = 8
# What another computation costs, in tokens of one: every weight is read once more.
_CALL = 2
# (n, vocab_size), arrays of the session's library
Logits = Any


class Work(Protocol):
    """One sequence's part of a step; see `arriero.engine.work.Work`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def logits(self) -> int: ...
    @property
    def salt(self) -> bytes: ...


class SlotSession(Protocol):
    """What holds the keys and values of sequences, a row each, and computes; see `OnnxSession`.

    Attributes:
        rows: sequences that there is room for.
        context: tokens of each.
        vocab_size: of the logits.
        library, device: whose arrays the logits are, and where.
    """

    rows: int
    context: int
    vocab_size: int

    @property
    def library(self) -> Literal["torch", "numpy"]: ...
    @property
    def device(self) -> Any: ...

    def run(
        self,
        first: int,
        ids: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        logits_at: npt.NDArray[np.int64],
    ) -> Logits: ...
    def joined(self, parts: Sequence[Logits]) -> Logits: ...
    def swap(self, one: int, other: int, length: int) -> None: ...
    def copy(self, source: int, target: int, start: int, end: int) -> None: ...
    def fill(self, row: int, start: int, values: npt.NDArray[np.float32]) -> None: ...


@dataclass(frozen=True)
class _Part:
    """Tokens of one sequence, and where their logits go.

    Attributes:
        slot, start, tokens: whose, the position of the first, and which.
        logits: of how many of the last of them logits are wanted.
        place: of the first of these in the answer.
        salt: of the sequence.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    logits: int
    place: int
    salt: bytes


@dataclass
class _Held:
    """What is in a row.

    Attributes:
        length: positions that a sequence has in it.
        tokens: of the first of them, as far as they are known; a prefix's places are negative.
        salt: tokens are looked up only for sequences of an equal one.
    """

    length: int = 0
    tokens: list[int] = field(default_factory=list)
    salt: bytes = b""

    def cut(self, length: int) -> None:
        """Forget what comes after so many positions."""
        self.length = length
        del self.tokens[length:]

    def add(self, tokens: Sequence[int]) -> None:
        """What comes next."""
        if len(self.tokens) == self.length:
            self.tokens += tokens
        self.length += len(tokens)

    def common(self, tokens: Sequence[int]) -> int:
        """With how many of the same tokens both begin."""
        both = zip(self.tokens, tokens, strict=False)
        return next((i for i, (one, other) in enumerate(both) if one != other), min(len(self.tokens), len(tokens)))


class SlotRunner:
    """The engine's `Runner` of a session.

    Attributes:
        num_blocks: slots.
        block_size: tokens of a slot.
        vocab_size: of the model.
        context: tokens of a sequence, without a prefix.
        prefix_length: learned keys and values that a slot begins with.
        reuses: False: no slot serves two sequences. What prompts begin with is copied here, without the engine's cache.
        recalled: of each work of the last run, how many of its tokens were so.
        library, device: of the logits.
        context_name: what a sequence that is too long is told to be longer than.
    """

    context_name = "the bundle's context"
    reuses = False
    adapters = None

    def __init__(self, session: SlotSession, prefix: PrefixArray | None = None) -> None:
        """
        Args:
            prefix: what every sequence begins with, if anything.
        """
        self._session, self._prefix = session, prefix
        self.prefix_length = 0 if prefix is None else prefix.shape[3]
        self.num_blocks, self.block_size = session.rows, session.context
        self.vocab_size, self.context = session.vocab_size, session.context - self.prefix_length
        self.library, self.device = session.library, session.device
        self._row = list(range(session.rows))  # of each slot
        self._held = [_Held() for _ in range(session.rows)]  # of each row
        self.recalled: list[int] = []

    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = 0) -> None:
        """See the engine's `Runner`."""
        if self._prefix is None:
            return
        row, places = self._row[blocks[0]], list(range(start - self.prefix_length, end - self.prefix_length))
        if self._held[row].tokens[start:end] != places:  # else the slot's last sequence began with it too
            self._session.fill(row, start, self._prefix[:, :, :, start:end])
            self._held[row].cut(start)
            self._held[row].add(places)

    def run(self, work: Sequence[Work]) -> Logits:
        """Compute and store; returns the wanted logits, in the order of the work: (sum of `logits`, vocab_size).

        Raises:
            GenerationError: for tokens that do not fit a slot.
        """
        together: list[_Part] = []
        long: list[tuple[int, int]] = []
        place = 0
        self.recalled = [0] * len(work)
        for index, item in enumerate(work):
            self._check(item)
            if len(item.tokens) <= SHORT:
                together.append(_Part(item.blocks[0], item.start, item.tokens, item.logits, place, item.salt))
            else:
                long.append((index, place))
            place += item.logits
        groups = self._groups(together)
        if not long and len(groups) == 1:  # its logits are in the order of the work
            return self._run(together)
        found: dict[int, Logits] = {}
        for index, first in long:
            done = self.recalled[index] = self._recall(work[index])
            for part in self._parts(work[index], done, first):
                logits = self._run([part])
                if part.logits:
                    found[part.place] = logits
        for group in groups:
            logits, at = self._run(group), 0
            for part in group:
                if part.logits:
                    found[part.place] = logits[at : at + part.logits]
                at += part.logits
        return self._session.joined([found[at] for at in sorted(found)])

    def _check(self, item: Work) -> None:
        count = len(item.tokens)
        fits = len(item.blocks) == 1 and 0 < count <= self.block_size - item.start and 0 <= item.logits <= count
        if not fits:
            raise GenerationError(
                f"{count} tokens at position {item.start} do not fit a slot of {self.block_size} (of {len(item.blocks)} slots)"
            )

    def _recall(self, item: Work) -> int:
        """How many of the first tokens need not be computed: their keys and values are in the slot, now if not before."""
        row = self._row[item.blocks[0]]
        own = self._held[row]
        if len(own.tokens) < item.start:
            return 0
        sequence = [*own.tokens[: item.start], *item.tokens]
        found, source = max(
            ((held.common(sequence), at) for at, held in enumerate(self._held) if held.salt == item.salt),
            default=(0, row),
        )
        found = min(found, len(sequence) - item.logits)
        if found <= item.start:
            return 0
        if source != row:
            self._session.copy(source, row, item.start, found)
            own.cut(item.start)
            own.add(sequence[item.start : found])
        own.salt = item.salt
        own.cut(found)
        return found - item.start

    def _parts(self, item: Work, done: int, place: int) -> list[_Part]:
        """A sequence's tokens after those that are done, no more than MAX_TOKENS at a time."""
        count, parts = len(item.tokens), []
        for begin in range(done, count, MAX_TOKENS):
            tokens = item.tokens[begin : begin + MAX_TOKENS]
            wanted = max(0, begin + len(tokens) - max(begin, count - item.logits))
            parts.append(_Part(item.blocks[0], item.start + begin, tokens, wanted, place, item.salt))
            place += wanted
        return parts

    def _groups(self, parts: list[_Part]) -> list[list[_Part]]:
        """Those that are computed together: all, if filling up costs less than computing them apart, else equal counts."""
        if not parts:
            return []
        counts = [len(part.tokens) for part in parts]
        filled = len(parts) * max(counts) - sum(counts)
        fits = all(part.start + max(counts) <= self.block_size for part in parts)
        if fits and filled <= _CALL * (len(set(counts)) - 1):
            return [parts]
        return [[part for part in parts if len(part.tokens) == count] for count in sorted(set(counts))]

    def _run(self, group: Sequence[_Part]) -> Logits:
        """The logits of a group, in its order."""
        first = self._bring_together([part.slot for part in group])
        size = max(len(part.tokens) for part in group)
        ids = np.zeros((len(group), size), np.int64)
        starts, counts = np.zeros(len(group), np.int64), np.zeros(len(group), np.int64)
        wanted: list[int] = []
        for part in group:
            held = self._held[self._row[part.slot]]
            held.cut(part.start)
            held.salt = part.salt
            row = self._row[part.slot] - first
            ids[row, : len(part.tokens)] = part.tokens
            starts[row], counts[row] = part.start, len(part.tokens)
            end = row * size + len(part.tokens)
            wanted += range(end - part.logits, end)
        try:
            logits = self._session.run(first, ids, starts, counts, np.array(wanted, np.int64))
        except BaseException:
            self._held = [_Held(held.length) for held in self._held]  # nothing can be relied on
            raise
        for part in group:
            self._held[self._row[part.slot]].add(part.tokens)
        return logits

    def _bring_together(self, slots: Sequence[int]) -> int:
        """Make the slots' rows neighbours; returns the first. A slot that makes room keeps its tokens."""
        rows = sorted(self._row[slot] for slot in slots)
        count = len(rows)
        if rows[-1] - rows[0] == count - 1:
            return rows[0]
        # the run of rows that holds most of them already
        first = max(
            range(self.num_blocks - count + 1),
            key=lambda start: (sum(start <= row < start + count for row in rows), -start),
        )
        window = range(first, first + count)
        holes = [row for row in window if row not in rows]
        slot_of = {row: slot for slot, row in enumerate(self._row)}
        for row, hole in zip([row for row in rows if row not in window], holes, strict=True):
            self._session.swap(row, hole, max(self._held[row].length, self._held[hole].length))
            self._held[row], self._held[hole] = self._held[hole], self._held[row]
            self._row[slot_of[row]], self._row[slot_of[hole]] = hole, row
        return first
