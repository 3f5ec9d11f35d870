"""What computes an engine's steps with an ONNX bundle; NumPy and ONNX Runtime only.

Each sequence has a slot, a block as long as the context. Where the keys and values of a slot lie is decided here: sequences
that go on together are brought side by side, since a batch is a run of neighbouring rows of one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arriero.errors import GenerationError
from arriero.export.onnx_session import OnnxSession

# Tokens of one computation: the scores of attention take heads x tokens x length numbers.
MAX_TOKENS = 256
# Sequences that bring at most so many tokens are computed together, each filled up to the most of them.
SHORT = 8
# What another computation costs, in tokens of one: every weight is read once more.
_CALL = 2


class Work(Protocol):
    """One sequence's part of a step; see `arriero.engine.runner.Work`."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def logits(self) -> int: ...


class _Part:
    """Tokens of one sequence, and where their logits go.

    Attributes:
        slot, start, tokens: whose, the position of the first, and which.
        logits: of how many of the last of them logits are wanted.
        place: of the first of these in the answer.
    """

    def __init__(self, slot: int, start: int, tokens: Sequence[int], logits: int, place: int) -> None:
        self.slot, self.start, self.tokens, self.logits, self.place = slot, start, tokens, logits, place


class OnnxRunner:
    """The engine's `Runner` of an ONNX graph, its logits NumPy arrays.

    Attributes:
        num_blocks: slots.
        block_size: tokens of a slot.
        vocab_size, context: of the model.
        prefix_length, reuses: 0 and False: a slot begins empty, and serves one sequence.
        device: of the logits.
    """

    prefix_length = 0
    reuses = False
    adapters = None
    device = "cpu"

    def __init__(self, session: OnnxSession) -> None:
        self._session = session
        self.num_blocks, self.block_size = session.rows, session.context
        self.vocab_size, self.context = session.vocab_size, session.context
        self._row = list(range(session.rows))  # of each slot
        self._length = [0] * session.rows  # tokens of each row

    def agree(self, numbers: list[int]) -> list[int]:
        """See the engine's `Runner`: there is one process."""
        return numbers

    def begin(self, blocks: Sequence[int], start: int, end: int, adapter: int = 0) -> None:
        """See the engine's `Runner`: there is no prefix."""

    def run(self, work: Sequence[Work]) -> npt.NDArray[np.float32]:
        """Compute and store; returns the wanted logits, in the order of the work: (sum of `logits`, vocab_size).

        Raises:
            GenerationError: for tokens that do not fit a slot.
        """
        together: list[_Part] = []
        alone: list[list[_Part]] = []
        place = 0
        for item in work:
            parts = self._parts(item, place)
            place += item.logits
            if len(item.tokens) <= SHORT:
                together += parts
            else:
                alone += [[part] for part in parts]
        groups = [*self._groups(together), *alone]
        if len(groups) == 1 and groups[0] == together:  # its logits are in the order of the work
            return self._run(together)
        answer = np.empty((place, self.vocab_size), np.float32)
        for group in groups:
            logits, at = self._run(group), 0
            for part in group:
                answer[part.place : part.place + part.logits] = logits[at : at + part.logits]
                at += part.logits
        return answer

    def _parts(self, item: Work, place: int) -> list[_Part]:
        """A sequence's tokens, no more than MAX_TOKENS at a time."""
        count, (slot, *others) = len(item.tokens), item.blocks
        if others or not 0 < count <= self.context - item.start or not 0 <= item.logits <= count:
            raise GenerationError(
                f"{count} tokens at position {item.start} do not fit a slot of {self.context} (of {len(item.blocks)} slots)"
            )
        parts = []
        for begin in range(0, count, MAX_TOKENS):
            tokens = item.tokens[begin : begin + MAX_TOKENS]
            wanted = max(0, begin + len(tokens) - max(begin, count - item.logits))
            parts.append(_Part(slot, item.start + begin, tokens, wanted, place))
            place += wanted
        return parts

    def _groups(self, parts: list[_Part]) -> list[list[_Part]]:
        """Those that are computed together: all, if filling up costs less than computing them apart, else equal counts."""
        if not parts:
            return []
        counts = [len(part.tokens) for part in parts]
        filled = len(parts) * max(counts) - sum(counts)
        fits = all(part.start + max(counts) <= self.context for part in parts)
        if fits and filled <= _CALL * (len(set(counts)) - 1):
            return [parts]
        return [[part for part in parts if len(part.tokens) == count] for count in sorted(set(counts))]

    def _run(self, group: Sequence[_Part]) -> npt.NDArray[np.float32]:
        """The logits of a group, in its order."""
        first = self._bring_together([part.slot for part in group])
        size = max(len(part.tokens) for part in group)
        ids = np.zeros((len(group), size), np.int64)
        starts, counts = np.zeros(len(group), np.int64), np.zeros(len(group), np.int64)
        wanted: list[int] = []
        for part in group:
            row = self._row[part.slot] - first
            ids[row, : len(part.tokens)] = part.tokens
            starts[row], counts[row] = part.start, len(part.tokens)
            end = row * size + len(part.tokens)
            wanted += range(end - part.logits, end)
            self._length[row + first] = part.start + len(part.tokens)
        return self._session.run(first, ids, starts, counts, np.array(wanted, np.int64))

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
            self._session.swap(row, hole, max(self._length[row], self._length[hole]))
            self._length[row], self._length[hole] = self._length[hole], self._length[row]
            self._row[slot_of[row]], self._row[slot_of[hole]] = hole, row
        return first
