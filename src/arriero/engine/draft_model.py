"""Guesses of a smaller model with the same vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arriero.engine.block_manager import BlockManager
from arriero.engine.request import Request
from arriero.engine.work import Runner, Work
from arriero.errors import GenerationError


@dataclass
class _Held:
    """What of a sequence the draft model has computed.

    Attributes:
        tokens: whose keys and values are in `blocks`, guesses included.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class DraftModel:
    """A `Drafter` whose guesses are a small model's likeliest tokens. It knows of no adapters, of no prefix either."""

    def __init__(self, runner: Runner, vocab_size: int, *, max_step_tokens: int = 2048) -> None:
        """
        Args:
            runner: of the small model, with a cache of its own.
            vocab_size: of the model that checks the guesses.

        Raises:
            GenerationError: the two models have different vocabularies.
        """
        if runner.vocab_size != vocab_size:
            raise GenerationError(
                f"the draft model has {runner.vocab_size} tokens and the model {vocab_size}: both must have the same tokenizer"
            )
        self._runner, self._max_step_tokens = runner, max_step_tokens
        self._blocks = BlockManager(runner.num_blocks, runner.block_size, prefix_cache=False)
        self._held: dict[Request, _Held] = {}

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        """See `Drafter`."""
        drafts: dict[Request, list[int]] = {request: [] for request in limits}
        for request in limits:
            self._rewind(request)
        for number in range(max(limits.values(), default=0)):
            going = [
                request
                for request, limit in limits.items()
                if number < min(limit, len(drafts[request]) + 1) and self._grow(request, drafts[request])
            ]
            if not going:
                break
            for request, token in zip(going, self._next(going, drafts), strict=True):
                drafts[request].append(token)
        return drafts

    def forget(self, request: Request) -> None:
        """See `Drafter`."""
        held = self._held.pop(request, None)
        if held is not None:
            self._blocks.release(held.blocks)

    def _rewind(self, request: Request) -> None:
        """Forget what was guessed and did not come."""
        held = self._held.setdefault(request, _Held())
        tokens = request.text
        same = min(len(held.tokens), len(tokens) - 1)
        # only the tail can differ: what was certain once stays
        while held.tokens[:same] != tokens[:same]:
            same -= 1
        del held.tokens[same:]

    def _grow(self, request: Request, drafts: Sequence[int]) -> bool:
        """Room for the sequence with its guesses; False where there is none, in the cache or in the context."""
        held, length = self._held[request], len(request.text) + len(drafts)
        needed = self._blocks.blocks_for(length) - len(held.blocks)
        if needed > self._blocks.available or length > self._runner.context:
            return False
        if needed > 0:
            held.blocks += self._blocks.take(needed, held.blocks[-1] if held.blocks else None)
        return True

    def _next(self, going: Sequence[Request], drafts: Mapping[Request, list[int]]) -> list[int]:
        """Each sequence's likeliest next token; long beginnings are computed in pieces first."""
        sequences = [request.text + drafts[request] for request in going]
        room = self._max_step_tokens // len(going)
        for request, sequence in zip(going, sequences, strict=True):
            held = self._held[request]
            while len(sequence) - len(held.tokens) > max(1, room):
                start = len(held.tokens)
                piece = sequence[start : min(start + self._max_step_tokens, len(sequence) - 1)]
                self._runner.run([Work(piece, start, held.blocks, 0)])
                held.tokens += piece
        work = [
            Work(sequence[len(held.tokens) :], len(held.tokens), held.blocks, 1)
            for sequence, held in ((s, self._held[r]) for r, s in zip(going, sequences, strict=True))
        ]
        likeliest: list[int] = self._runner.run(work).argmax(-1).tolist()
        for request, sequence in zip(going, sequences, strict=True):
            self._held[request].tokens = list(sequence)
        return likeliest
