"""Guesses of the tokens that follow, which the model then checks many at a time.

A guess is kept if it is the very token that would have been drawn: the sampler draws each position as it would have without
guesses, with the same random number, and the first position at which the draw differs from the guess ends the step. So
speculation never changes an answer, greedy or drawn; it only changes how many tokens a step gives. (Leviathan et al. 2023,
arXiv:2211.17192, accept by comparing two distributions instead, because there the guess is drawn too. Here it is fixed before
the draw, and both rules keep it with the probability that the model gives it.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from arriero.engine.request import Request

MAX_DRAFT_TOKENS = 64


class Drafter(Protocol):
    """Guesses for several requests at once."""

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        """At most so many tokens for each request; none where it has no idea."""
        ...

    def forget(self, request: Request) -> None:
        """A request has gone."""
        ...


@dataclass
class _Index:
    """Where each short run of tokens of a sequence was seen last, and what of the sequence is in here."""

    last: list[dict[tuple[int, ...], int]]
    done: int = 0


class PromptLookup:
    """What followed the last time that the sequence had the tokens it ends with (A. Saxena, "Prompt Lookup Decoding", 2023).

    Good where answers repeat what they were given: code that is edited, passages that are quoted or summarized.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        """
        Args:
            longest, shortest: of the runs that are looked up, in tokens; longer ones first.

        Raises:
            ValueError: no run has such a length.
        """
        if not 1 <= shortest <= longest:
            raise ValueError(f"runs of {shortest} to {longest} tokens: there are none")
        self._sizes = range(longest, shortest - 1, -1)
        self._indexes: dict[Request, _Index] = {}

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        """See `Drafter`."""
        return {request: self._guess(request, limit) for request, limit in limits.items() if limit > 0}

    def forget(self, request: Request) -> None:
        """See `Drafter`."""
        self._indexes.pop(request, None)

    def _guess(self, request: Request, limit: int) -> list[int]:
        tokens = request.tokens
        index = self._indexes.setdefault(request, _Index([{} for _ in self._sizes]))
        # runs that end before the last token; the last ones are what is looked up
        for end in range(max(index.done, 1), len(tokens)):
            for size, last in zip(self._sizes, index.last, strict=True):
                if end >= size:
                    last[tuple(tokens[end - size : end])] = end
        index.done = len(tokens)
        for size, last in zip(self._sizes, index.last, strict=True):
            at = last.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if at is not None:
                return self._continue(tokens, at, limit)
        return []

    @staticmethod
    def _continue(tokens: Sequence[int], at: int, limit: int) -> list[int]:
        """The tokens from `at` on; past the end the guess goes on with itself, as what repeats does."""
        found: list[int] = []
        known = len(tokens)
        for place in range(at, at + limit):
            found.append(tokens[place] if place < known else found[place - known])
        return found


@dataclass
class SpeculationCounters:
    """Attributes:
    proposed, accepted: guessed tokens, and those that were kept.
    """

    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of the guesses that were kept, 0 without any."""
        return self.accepted / self.proposed if self.proposed else 0.0


@dataclass
class Speculation:
    """Whether and how far to guess: speculation is off by itself while it loses.

    Tokens a second are measured with and without guesses, in turns of `window` steps; the better way goes on for `hold` turns.
    That changes speed alone, never an answer.

    Attributes:
        drafter: makes the guesses.
        tokens: how many at most for each request and step.
    """

    drafter: Drafter
    tokens: int = 4
    window: int = 16
    hold: int = 16
    counters: SpeculationCounters = field(default_factory=SpeculationCounters)
    on: bool = True
    _rates: dict[bool, float] = field(default_factory=dict)
    _steps: int = 0
    _given: int = 0
    _seconds: float = 0.0
    _left: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"{self.tokens} guessed tokens a step: from 1 to {MAX_DRAFT_TOKENS} are possible")

    def propose(self, requests: Sequence[Request]) -> None:
        """Give requests that are to go on guesses, if that pays."""
        if not self.on:
            return
        began = time.perf_counter()
        limits = {r: min(self.tokens, r.longest - len(r.tokens) - 1) for r in requests}
        for request, guessed in self.drafter.propose({r: limit for r, limit in limits.items() if limit > 0}).items():
            request.drafts = guessed[: limits[request]]
        self._seconds += time.perf_counter() - began

    def count(self, proposed: int, accepted: int) -> None:
        """What became of the guesses of a step, of all its requests together."""
        self.counters.proposed += proposed
        self.counters.accepted += accepted

    def measure(self, tokens: int, seconds: float) -> None:
        """A step is over: it gave so many tokens and took so many seconds, guessing apart, of which `propose` keeps count.

        What passes between two steps does not count: a server waits there for requests.
        """
        self._steps += 1
        self._given += tokens
        self._seconds += seconds
        if self._steps < self.window:
            return
        rate = self._given / max(self._seconds, 1e-9)
        self._steps, self._given, self._seconds = 0, 0, 0.0
        if self._left > 0:
            self._left -= 1
            return
        self._rates[self.on] = rate
        if len(self._rates) < 2:
            self.on = not self.on  # the other way for a turn
        else:
            self.on, self._left, self._rates = self._rates[True] >= self._rates[False], self.hold, {}

    def forget(self, request: Request) -> None:
        """A request has gone."""
        self.drafter.forget(request)
