"""The workloads as jobs: random prompts whose sizes are those of the options, as far as the model's context goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from arriero.config.bench import BenchOptions
from arriero.data.tokenizer import Tokenizer
from arriero.engine.benchmark.measured import Job
from arriero.errors import ConfigError

SHARED_NEW_TOKENS = 8  # of an answer where prompts share a beginning: it is the prompts that matter
SHARED_OWN_TOKENS = 16  # that a prompt has after it
MIXED_SHORTEST = 8  # shortest prompt and answer of uneven requests


@dataclass(frozen=True)
class Prompts:
    """Random prompts of ordinary tokens.

    Attributes:
        ids: to choose from.
        context: tokens of prompt and answer that the model can take.
    """

    ids: Sequence[int]
    context: int
    random: np.random.Generator

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, context: int, seed: int) -> Prompts:
        """Of the ids that both tokenizer and model have, less those that end an answer.

        Raises:
            ConfigError: nothing is left, or the context has no room for two tokens.
        """
        stops = set(tokenizer.stop_token_ids)
        ids = [i for i in range(min(tokenizer.vocab_size, vocab_size)) if i not in stops]
        if not ids or context < 2:
            raise ConfigError(
                f"a model of {vocab_size} tokens and a context of {context} has nothing to measure: give another"
            )
        return cls(ids, context, np.random.default_rng(seed))

    def draw(self, length: int) -> list[int]:
        """One prompt of so many tokens."""
        return [self.ids[i] for i in self.random.integers(0, len(self.ids), length)]

    def fit(self, prompt: int, new: int) -> tuple[int, int]:
        """Lengths of prompt and answer, cut to the context: the prompt first, down to one token."""
        prompt = max(1, min(prompt, self.context - new))
        return prompt, min(new, self.context - prompt)


def decode(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """Equal requests, all running at once; a job for each batch size."""
    length, new = prompts.fit(options.src_length, options.max_new_tokens)
    return [
        Job(
            "decode",
            f"{batch} x ({length} in, {new} out)",
            [prompts.draw(length) for _ in range(batch)],
            [new] * batch,
            batch,
        )
        for batch in options.batch_sizes
    ]


def prefill(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """One prompt and a single token of answer; a job for each length."""
    lengths = dict.fromkeys(prompts.fit(length, 1)[0] for length in options.prompt_lengths)
    return [Job("prefill", f"{length} in", [prompts.draw(length)], [1], 1) for length in lengths]


def mixed(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """Uneven requests, more than can run at once: prompts and answers of any length up to that of the options."""
    length, new = prompts.fit(options.src_length, options.max_new_tokens)
    random, count = prompts.random, options.num_requests
    ins = random.integers(min(MIXED_SHORTEST, length), length + 1, count)
    outs = random.integers(min(MIXED_SHORTEST, new), new + 1, count)
    return [
        Job(
            "mixed",
            f"{count} x (to {length} in, to {new} out), {options.max_running} running",
            [prompts.draw(int(n)) for n in ins],
            [int(n) for n in outs],
            options.max_running,
        )
    ]


def shared_prefix(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """Prompts that begin alike, each with a few tokens of its own and a short answer."""
    new = min(options.max_new_tokens, SHARED_NEW_TOKENS, prompts.context - 1)
    length, new = prompts.fit(options.shared_length + SHARED_OWN_TOKENS, new)
    own = min(SHARED_OWN_TOKENS, length - 1)
    shared, count = prompts.draw(length - own), options.num_requests
    return [
        Job(
            "shared_prefix",
            f"{count} x ({length - own} shared + {own} in, {new} out), {options.max_running} running",
            [shared + prompts.draw(own) for _ in range(count)],
            [new] * count,
            options.max_running,
        )
    ]


def long_context(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """One request that fills the context asked for, or the model's."""
    whole = min(options.context_length, prompts.context)
    new = min(options.max_new_tokens, whole - 1)
    return [Job("long_context", f"{whole - new} in, {new} out", [prompts.draw(whole - new)], [new], 1)]


def cuts(options: BenchOptions, context: int) -> list[str]:
    """Options, in words, that these workloads cut to what the model's context has room for; none that is as by default."""
    usual, new = BenchOptions(), options.max_new_tokens
    chosen = set(options.workloads)
    whole = min(options.context_length, context)
    beside = {
        name: max(1, context - length) for name, length in (("answer", new), ("short", min(new, SHARED_NEW_TOKENS)))
    }
    found = []
    if chosen & {"decode", "mixed"} and options.src_length != usual.src_length:
        found.append(("src_length", options.src_length, beside["answer"]))
    if "prefill" in chosen and options.prompt_lengths != usual.prompt_lengths:
        found.append(("prompt_lengths", max(options.prompt_lengths), context - 1))
    if "shared_prefix" in chosen and options.shared_length != usual.shared_length:
        found.append(("shared_length", options.shared_length, max(1, beside["short"] - SHARED_OWN_TOKENS)))
    if "long_context" in chosen and options.context_length != usual.context_length:
        found.append(("context_length", options.context_length, context))
    if chosen & {"decode", "mixed"} and new != usual.max_new_tokens:
        found.append(("max_new_tokens", new, context - 1))
    elif "long_context" in chosen and new != usual.max_new_tokens:
        found.append(("max_new_tokens", new, whole - 1))
    return [f"--{name} {given} to {room}" for name, given, room in found if given > room]


_MAKERS: dict[str, Callable[[BenchOptions, Prompts], list[Job]]] = {
    "decode": decode,
    "prefill": prefill,
    "mixed": mixed,
    "shared_prefix": shared_prefix,
    "long_context": long_context,
}


def make_jobs(options: BenchOptions, prompts: Prompts) -> list[Job]:
    """All jobs of the options, in their order."""
    return [job for name in options.workloads for job in _MAKERS[name](options, prompts)]
