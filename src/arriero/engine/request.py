"""What the scheduler knows of a request: token ids, counts and blocks. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from arriero.errors import GenerationError


class Status(Enum):
    """Where a request is on its way."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A sequence that grows: the prompt, then the answer.

    One rule covers prompts in chunks, cached beginnings, preemption and guessed tokens: `computed` catches up with
    `target`, as far as a step's budget goes.

    Attributes:
        tokens: of the prompt and of the answer so far.
        prompt_length: how many of them are the prompt.
        max_new_tokens: of the answer at most.
        priority: lower goes first; then who came first.
        arrival: the number in the order of coming; the scheduler sets it.
        salt: cached beginnings are shared only among requests of equal ones (tenant, adapter).
        adapter: the number of the adapter that it uses; 0 for none.
        prefix_length: how many of its first places a learned prefix takes, under ids that no token has.
        drafts: guesses of the tokens that follow, to be checked in the next step.
        scored: of how many of its first tokens the logits have been used, where those of all of the prompt are wanted; only so
            many can come from the cache. None: they are not wanted, or no more.
        computed: tokens whose keys and values are in `blocks`.
        blocks: the block table.
        reserved: neighbours that are kept for it as long as nobody needs them.
        digests: of its full blocks, as far as they are known.
        sealed: how many of its first blocks others can share.
        coming: up to which of its blocks others wait for, to share them.
        cached: tokens that it was spared by the cache, at its first admission.
        preemptions: how often it lost its blocks.
    """

    tokens: list[int]
    prompt_length: int
    max_new_tokens: int
    priority: int = 0
    arrival: int = -1
    salt: bytes = b""
    adapter: int = 0
    prefix_length: int = 0
    drafts: list[int] = field(default_factory=list)
    scored: int | None = None
    status: Status = Status.WAITING
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    reserved: range = range(0)
    digests: list[bytes] = field(default_factory=list)
    sealed: int = 0
    coming: int = 0
    cached: int = 0
    preemptions: int = 0

    @property
    def target(self) -> int:
        """How many tokens there are to compute, guesses included."""
        return len(self.tokens) + len(self.drafts)

    @property
    def text(self) -> list[int]:
        """Its tokens without a prefix's places."""
        return self.tokens[self.prefix_length :] if self.prefix_length else self.tokens

    @property
    def longest(self) -> int:
        """Tokens that it can come to."""
        return self.prompt_length + self.max_new_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """The order of importance: least first."""
        return self.priority, self.arrival


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse a prompt that no model of this vocabulary can read.

    Raises:
        GenerationError: it is empty, or holds something else than the vocabulary's ids.
    """
    if not prompt:
        raise GenerationError("the prompt is empty: give at least one token, such as bos")
    if not all(isinstance(token, int) for token in prompt):
        raise GenerationError("the prompt holds something else than token ids, which are whole numbers")
    strange = next((i for i in (min(prompt), max(prompt)) if not 0 <= i < vocab_size), None)
    if strange is not None:
        raise GenerationError(
            f"the prompt holds token id {strange} and the model has ids 0 to {vocab_size - 1}: "
            "the tokenizer is not this model's"
        )
