"""How the next token is chosen from the logits: what an answer remembers between its tokens, and what a sampler does.

The processors are those of transformers' `generate`, in its order: repetition penalty, no early end, temperature,
top-k, top-p, min-p. Before them come those of the OpenAI API: bias, then frequency and presence penalty. They are written
twice: `torch_sampling` works on many rows at once, on any device; `numpy_sampling` needs NumPy alone.

A row draws with random numbers of its own, which come from NumPy for both. So an answer with a seed does not depend on what
computes it, as far as the logits are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from numpy.random import PCG64

from arriero.engine.grammar import GrammarState
from arriero.engine.logprobs import TokenLogprobs
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.work import Library
from arriero.errors import GenerationError

if TYPE_CHECKING:
    import torch

BROKEN = -1  # in the place of a token
# Top-p needs sorted logits. A nucleus is nearly always within this many, which cost much less than a full sort.
NUCLEUS_CANDIDATES = 1024
Array = TypeVar("Array")


@dataclass
class SamplingRow(Generic[Array]):
    """One answer's state between its tokens.

    Attributes:
        stop_ids: (N,) int64, tokens that may not come before `min_new_tokens`.
        prompt: what the repetition penalty counts before the answer; empty when it is off.
        drawn: the answer so far.
        seen: (V,) bool, the tokens that the repetition penalty counts; None when it is off, and while nothing is drawn.
        counts: (V,) fp32, how often the answer has each token; None where no penalty counts them, and while nothing is drawn.
        bias: ids (N,) and what is added to their logits (N,) fp32; None without.
        random: the row's own random numbers, so that its draws do not depend on the other rows; None when greedy.
        grammar: which tokens the answer's structure lets come next; None without one.
    """

    params: SamplingParams
    stop_ids: Array
    prompt: tuple[int, ...] = field(default=(), repr=False)
    drawn: list[int] = field(default_factory=list, repr=False)
    seen: Array | None = field(default=None, repr=False)
    counts: Array | None = field(default=None, repr=False)
    bias: tuple[Array, Array] | None = None
    random: PCG64 | None = None
    grammar: GrammarState | None = None

    def uniform(self) -> float:
        """A random number from 0 to 1, without 1, with 53 bits. NumPy promises that these bits stay the same for ever."""
        assert self.random is not None
        return float(self.random.random_raw() >> 11) * 2.0**-53

    def note(self, token: int) -> None:
        """The answer goes on with this token."""
        self.drawn.append(token)
        if self.seen is not None:
            self.seen[token] = True  # type: ignore[index]  # both libraries' arrays can be
        if self.counts is not None:
            self.counts[token] += 1  # type: ignore[index]
        if self.grammar is not None:
            self.grammar.advance(token)

    def release(self) -> None:
        """Give up what is as long as the vocabulary: nothing is drawn for now. The next draw makes it again."""
        self.seen = self.counts = None

    @property
    def may_not_end(self) -> bool:
        """Whether it is too young to end; where its structure is complete nothing else can come."""
        finished = self.grammar is not None and self.grammar.finished
        return len(self.drawn) < self.params.min_new_tokens and not finished

    @property
    def dead_end(self) -> str:
        """Why nothing can come next, which is then the request's own fault; "" where something can."""
        if self.grammar is None or (self.grammar.accepting and not self.may_not_end):
            return ""
        stops: list[int] = self.stop_ids.tolist()  # type: ignore[attr-defined]  # both libraries' arrays have it
        wanted = [i for i in stops if self.grammar.allowed[i]]
        if not wanted or int(self.grammar.allowed.sum()) > len(wanted):
            return ""
        shown = ", ".join(map(str, wanted[:4])) + (", ..." if len(wanted) > 4 else "")
        kind = self.params.structure.kind if self.params.structure is not None else "structure"
        return (
            f"the answer cannot follow its {kind} any further: only stop tokens can come next ({shown}), and it may not end "
            "there; take them out of stop_token_ids"
        )


class Sampler(ABC, Generic[Array]):
    """Chooses each row's next token; a row's choice depends on that row alone."""

    @abstractmethod
    def __call__(self, logits: Array, rows: Sequence[SamplingRow[Array]]) -> list[int]:
        """The rows' next tokens; their states move on, the logits are left alone.

        A row whose logits are no finite numbers gets `BROKEN`, and the others what they get without it.

        Args:
            logits: (B, V).
            rows: B states.
        """

    @abstractmethod
    def logprobs(self, logits: Array, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """Of each row's token, and of so many likeliest ones.

        Args:
            logits: (B, V), raw.
            tokens, counts: B each.
        """

    def start(
        self,
        params: SamplingParams,
        prompt: Iterable[int],
        stop_ids: Iterable[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> SamplingRow[Array]:
        """The state before an answer's first token. It is no longer than the prompt, since the answer may have to wait.

        Raises:
            GenerationError: a bias for a token that the model does not have; a grammar of the empty text, and no stop token.
        """
        stops = sorted(i for i in set(stop_ids) if i < vocab_size)
        if grammar is not None and grammar.finished and not stops:
            raise GenerationError(
                "the answer's structure allows only the empty text, and there is no stop token to say so"
            )
        row = SamplingRow(params, self._ids(stops), grammar=grammar)
        if params.repetition_penalty != 1.0:
            row.prompt = tuple(prompt)
        if params.logit_bias:
            strange = [token for token in params.logit_bias if token >= vocab_size]
            if strange:
                raise GenerationError(
                    f"logit_bias names token id {strange[0]} and the model has ids 0 to {vocab_size - 1}"
                )
            row.bias = (self._ids(list(params.logit_bias)), self._numbers(list(params.logit_bias.values())))
        if not params.greedy:
            row.random = PCG64(params.seed)  # None: bits of the operating system
        return row

    @abstractmethod
    def _ids(self, values: Sequence[int]) -> Array:
        """(N,) int64."""

    @abstractmethod
    def _numbers(self, values: Sequence[float]) -> Array:
        """(N,) fp32."""

    @abstractmethod
    def _marks(self, size: int, ids: Collection[int]) -> Array:
        """(size,) bool, true at these places."""

    @abstractmethod
    def _tally(self, size: int, counts: Mapping[int, int]) -> Array:
        """(size,) fp32, these numbers at their places and 0 elsewhere."""

    def _count(self, rows: Iterable[SamplingRow[Array]], vocab_size: int) -> None:
        """Make what the rows' penalties need, where it is not there yet."""
        for row in rows:
            params = row.params
            if row.seen is None and params.repetition_penalty != 1.0:
                row.seen = self._marks(vocab_size, {*row.prompt, *row.drawn})
            if row.counts is None and (params.frequency_penalty or params.presence_penalty):
                row.counts = self._tally(vocab_size, Counter(row.drawn))


def sampler_of(library: Library, device: torch.device | str) -> Sampler[Any]:
    """What draws from logits of this library on this device."""
    if library == "numpy":
        from arriero.engine.numpy_sampling import NumpySampler

        return NumpySampler()
    from arriero.engine.torch_sampling import TorchSampler

    return TorchSampler(device)
