"""What a request asks of its answers. Every value is checked here, so that none can break a step that others share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from arriero.config.generation import GenerationOptions, asks_for_draws
from arriero.engine.structure import Structure
from arriero.errors import GenerationError

MAX_ANSWERS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 256  # characters
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 100
# Log-probabilities of one request, alternatives included, in all of its answers: a few hundred megabytes of memory.
MAX_LOGPROB_VALUES = 2**21
# What single precision divides logits by without making an infinity or nothing of them.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e6
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answers to one prompt are generated.

    Attributes:
        max_new_tokens: at most so many tokens.
        min_new_tokens: no stop token or stop string counts before so many tokens.
        temperature: logits are divided by it; 0 means greedy, None 1.
        top_k: draw among the k likeliest tokens; 0 means all.
        top_p: draw among the likeliest tokens that together have this probability (https://arxiv.org/abs/1904.09751).
        min_p: drop tokens below this share of the likeliest one's probability (https://arxiv.org/abs/2407.01082).
        repetition_penalty: above 1, tokens of prompt and answer become less likely (https://arxiv.org/abs/1909.05858).
        frequency_penalty: taken from a token's logit for each time that the answer has it already.
        presence_penalty: taken from the logit of each token that the answer has already.
        logit_bias: added to the logits of tokens, by id.
        do_sample: draw at random; false means the likeliest token always, and temperature, top-k, top-p and min-p have no
            effect. None: draw if temperature (but 0), top-k, top-p or min-p is set, or several answers are asked for.
        stop_token_ids: tokens that end the answer, besides the tokenizer's own.
        stop_strings: texts that end the answer; neither they nor what follows them is part of it. `stop` is another name for
            it where a SamplingParams is made.
        seed: the answer is a function of prompt, parameters and seed, whatever else is generated beside it.
        ignore_eos: the tokenizer's own stop tokens do not end the answer.
        logprobs: with each token its log-probability, as the model gives it before any of the above, and those of the so many
            likeliest; None: without.
        prompt_logprobs: the same for each token of the prompt but the first, before which there is nothing; None: without.
        n: so many answers. The one with index i is drawn with seed + i; greedy ones are all alike.
        best_of: so many answers are generated, and the n with the highest log-probability per token are given, the best
            first, as in the OpenAI API. It is the model's own, as in `logprobs`. None: n.
        structure: the form that the answer must have; None: any. It ends the answer where nothing can follow, and stop tokens
            count only where it is complete. An answer that max_new_tokens cuts short is the beginning of one.

    Raises:
        GenerationError: a value outside its range, or of another type.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    do_sample: bool | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop: InitVar[str | Sequence[str] | None] = None
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    structure: Structure | None = None

    def __post_init__(self, stop: str | Sequence[str] | None) -> None:
        if stop is not None:
            if self.stop_strings:
                raise GenerationError("stop and stop_strings are the same: give one of them")
            object.__setattr__(self, "stop_strings", [stop] if isinstance(stop, str) else stop)
        # Lists, as JSON gives them, are taken too.
        for name in ("stop_token_ids", "stop_strings"):
            given = getattr(self, name)
            self._check(name, isinstance(given, list | tuple), "a list")
            object.__setattr__(self, name, tuple(given))
        self._check_integer("max_new_tokens", 1)
        self._check_integer("min_new_tokens", 0)
        self._check("min_new_tokens", self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens")
        if self.temperature is not None:
            self._check_number("temperature", 0.0, MAX_TEMPERATURE)
        self._check_integer("top_k", 0)
        self._check_number("top_p", 0.0, 1.0)
        self._check("top_p", self.top_p > 0.0, "above 0 and at most 1")
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check("do_sample", self.do_sample is None or isinstance(self.do_sample, bool), "true, false or None")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        for name in ("logprobs", "prompt_logprobs"):
            self._check_integer(name, 0, MAX_LOGPROBS, optional=True)
        self._check_integer("n", 1, MAX_ANSWERS)
        self._check_integer("best_of", self.n, MAX_ANSWERS, optional=True)
        self._check_integer("seed", 0, 2**64 - 1, optional=True)
        self._check("structure", self.structure is None or isinstance(self.structure, Structure), "a Structure")
        self._check_stops()
        self._check_bias()

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            shown = repr(getattr(self, name))
            shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
            raise GenerationError(f"{name} is {shown}: it must be {allowed}")

    def _check_integer(self, name: str, least: int, most: int = MAX_INTEGER, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (optional and value is None):
            self._check(name, _is_integer(value), "a whole number")
            self._check(name, least <= value <= most, f"from {least} to {most}")

    def _check_number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        self._check(name, _is_number(value), "a number")
        self._check(name, least <= value <= most, f"from {least:g} to {most:g}")  # which NaN is not

    def _check_stops(self) -> None:
        name = "stop_token_ids"
        self._check(name, len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS} ids")
        self._check(name, all(_is_integer(i) and i >= 0 for i in self.stop_token_ids), "token ids, 0 or more")
        name = "stop_strings"
        self._check(name, len(self.stop_strings) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} texts")
        self._check(name, all(isinstance(t, str) and t for t in self.stop_strings), "texts that are not empty")
        short = all(len(text) <= MAX_STOP_STRING_LENGTH for text in self.stop_strings)
        self._check(name, short, f"texts of at most {MAX_STOP_STRING_LENGTH} characters")

    def _check_bias(self) -> None:
        name, bias = "logit_bias", self.logit_bias
        self._check(name, isinstance(bias, Mapping), "token ids with a number for each")
        self._check(name, len(bias) <= MAX_LOGIT_BIASES, f"of at most {MAX_LOGIT_BIASES} tokens")
        valid = all(
            _is_integer(token) and token >= 0 and _is_number(value) and -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS
            for token, value in bias.items()
        )
        self._check(name, valid, f"finite numbers from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g} for token ids")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.divisor < MIN_TEMPERATURE:
            return True
        if self.do_sample is not None:
            return not self.do_sample
        return self.candidates == 1 and not asks_for_draws(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def divisor(self) -> float:
        """The temperature that logits are divided by."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def candidates(self) -> int:
        """How many answers are generated."""
        return self.best_of if self.best_of is not None else self.n

    @property
    def selects(self) -> bool:
        """Whether more answers are generated than given."""
        return self.candidates > self.n

    def of_candidate(self, index: int) -> SamplingParams:
        """Of one of several answers alone; the first one has the prompt's log-probabilities."""
        if self.candidates == 1:
            return self
        return replace(
            self,
            n=1,
            best_of=None,
            do_sample=not self.greedy,  # of all of them: one alone may ask for no draws
            seed=None if self.seed is None else (self.seed + index) % 2**64,
            logprobs=0 if self.selects and self.logprobs is None else self.logprobs,
            prompt_logprobs=self.prompt_logprobs if index == 0 else None,
        )

    def logprob_values(self, length: int) -> int:
        """How many log-probabilities are asked for at most, with a prompt of this length."""
        values = 0
        if self.prompt_logprobs is not None:
            values += length * (1 + self.prompt_logprobs)
        if self.logprobs is not None:
            values += self.candidates * self.max_new_tokens * (1 + self.logprobs)
        return values

    def shortened(self, length: int) -> SamplingParams:
        """With answers so short that their log-probabilities, with a prompt of this length, are given; as it is where that
        cannot be, or need not."""
        more = self.logprob_values(length) - MAX_LOGPROB_VALUES
        if self.logprobs is None or more <= 0:
            return self
        longest = self.max_new_tokens - -(-more // (self.candidates * (1 + self.logprobs)))
        if longest < 1:
            return self
        return replace(self, max_new_tokens=longest, min_new_tokens=min(self.min_new_tokens, longest))

    def within(self, room: int) -> SamplingParams:
        """With answers of no more than so many tokens; as it is where that is less than they must have."""
        longest = min(self.max_new_tokens, room)
        if longest == self.max_new_tokens or longest < max(1, self.min_new_tokens):
            return self
        return replace(self, max_new_tokens=longest)

    def check_prompt(self, length: int) -> None:
        """
        Raises:
            GenerationError: more log-probabilities are asked for, with a prompt of this length, than memory is spent on.
        """
        values = self.logprob_values(length)
        if values > MAX_LOGPROB_VALUES:
            raise GenerationError(
                f"logprobs and prompt_logprobs ask for up to {values} log-probabilities: at most {MAX_LOGPROB_VALUES} are "
                "given; ask for fewer alternatives, tokens or answers"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def params_from_options(options: GenerationOptions) -> SamplingParams:
    """The sampling parameters that a command's generation options ask for."""
    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        do_sample=options.do_sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop_strings=tuple(options.stop),
        seed=options.seed,
    )
