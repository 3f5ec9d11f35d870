"""Slots, rows and copied beginnings: whatever comes and goes, each sequence is computed after its own tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.export.slot_runner import MAX_TOKENS, SHORT, SlotRunner

CONTEXT, ROWS, PREFIX = 700, 4, 5
Integers = npt.NDArray[np.int64]


def digest(tokens: npt.NDArray[np.int64]) -> float:
    """A number of a sequence's tokens that fp32 holds; those of a prefix are -1."""
    value = 7
    for token in tokens.tolist():
        value = (value * 31 + token + 2) % 65521
    return float(value)


class TokensInRows:
    """A session whose keys and values are the tokens themselves, and whose logits are a digest of all that is before them."""

    rows, context, vocab_size = ROWS, CONTEXT, 1
    library: Literal["numpy"] = "numpy"
    device = "cpu"

    def __init__(self) -> None:
        self.cache = np.full((ROWS, CONTEXT), -9, np.int64)
        self.computed = 0
        self.fails = False

    def run(
        self, first: int, ids: Integers, starts: Integers, counts: Integers, logits_at: Integers
    ) -> npt.NDArray[np.float32]:
        if self.fails:
            self.cache[first : first + len(ids)] = -8  # what is in them then is anybody's guess
            raise RuntimeError("failed")
        assert first + len(ids) <= ROWS
        logits = np.zeros((len(ids), ids.shape[1]), np.float32)
        for row, (tokens, start, count) in enumerate(zip(ids, starts, counts, strict=True)):
            assert start + len(tokens) <= CONTEXT
            self.cache[first + row, start : start + len(tokens)] = tokens  # what fills it up is written too
            for at in range(count):
                logits[row, at] = digest(self.cache[first + row, : start + at + 1])
        self.computed += int(counts.sum())
        return logits.reshape(-1, 1)[logits_at]

    def joined(self, parts: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)

    def swap(self, one: int, other: int, length: int) -> None:
        self.cache[[one, other], :length] = self.cache[[other, one], :length]
        self.cache[[one, other], length:] = -9

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        self.cache[target, start:end] = self.cache[source, start:end]

    def fill(self, row: int, start: int, values: npt.NDArray[np.float32]) -> None:
        self.cache[row, start : start + values.shape[3]] = values[0, 0, 0, :, 0].astype(np.int64)


@dataclass(frozen=True)
class Work:
    tokens: list[int]
    start: int
    blocks: list[int]
    logits: int
    salt: bytes


@dataclass
class Sequence:
    """One that is computed bit by bit, with a prefix's places before its tokens."""

    tokens: list[int]
    salt: bytes
    slot: int
    done: int = 0
    expected: list[float] = field(default_factory=list)


@given(seed=st.integers(0, 2**32), prefix=st.booleans(), failures=st.booleans())
@settings(max_examples=100)
def test_any_lives(seed: int, prefix: bool, failures: bool) -> None:
    drawn = random.Random(seed)
    session = TokensInRows()
    array = np.full((1, 2, 1, PREFIX, 1), -1, np.float32) if prefix else None
    runner, places = SlotRunner(session, array), PREFIX if prefix else 0
    beginnings = [drawn.choices(range(9), k=drawn.choice((3, 20, 60, 300))) for _ in range(3)]
    free, running = list(range(ROWS)), []
    for _ in range(40):
        while free and drawn.random() < 0.6:
            tokens = [*drawn.choice(beginnings), *drawn.choices(range(9), k=drawn.choice((0, 1, 5, 30, MAX_TOKENS)))]
            slot = free.pop(drawn.randrange(len(free)))
            running.append(Sequence(tokens, drawn.choice((b"", b"a")), slot))
            if prefix:
                cut = drawn.randrange(PREFIX + 1)
                for start, end in ((0, cut), (cut, PREFIX)):
                    if start < end:
                        runner.begin([slot], start, end)
        work, shares = [], drawn.sample(running, drawn.randint(0, len(running)))
        for sequence in shares:
            count = min(drawn.choice((1, 1, 2, SHORT, SHORT + 1, 40, 600)), len(sequence.tokens) - sequence.done)
            begin, end = sequence.done, sequence.done + count
            wanted = drawn.choice((0, 1, count))
            work.append(Work(sequence.tokens[begin:end], places + begin, [sequence.slot], wanted, sequence.salt))
            whole = np.array([-1] * places + sequence.tokens[:end])
            sequence.expected = [digest(whole[: places + at + 1]) for at in range(end - wanted, end)]
            sequence.done = end
        # what needs no logits may be there already, and then nothing is computed that could fail
        if failures and drawn.random() < 0.1 and any(item.logits for item in work):
            session.fails = True
            with pytest.raises(RuntimeError, match="failed"):
                runner.run(work)
            session.fails = False
            free, running = list(range(ROWS)), []  # as the engine ends all that runs
            continue
        if work:
            wanted_logits = [value for sequence in shares for value in sequence.expected]
            assert runner.run(work)[:, 0].tolist() == wanted_logits
        for sequence in [one for one in running if one.done == len(one.tokens) or drawn.random() < 0.05]:
            running.remove(sequence)
            free.append(sequence.slot)


def test_beginnings_are_copied() -> None:
    session = TokensInRows()
    runner, shared = SlotRunner(session), list(range(100))
    runner.run([Work(shared, 0, [0], 1, b"")])
    runner.run([Work([*shared, 7], 0, [slot], 1, b"") for slot in (1, 2, 3)])
    assert session.computed == 100 + 3
    runner.run([Work([*shared, 8], 0, [1], 101, b"")])  # all logits are wanted, so all is computed
    assert session.computed == 100 + 3 + 101
