"""The prompts of rows in a bundle's context, with room for their answers. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero.errors import ConfigError, DataError

if TYPE_CHECKING:
    from arriero.data.prompt_tokens import SFTTokenizer
    from arriero.data.samples import Sample


@dataclass(frozen=True)
class AnswerLength:
    """How long answers may be.

    Attributes:
        told: in tokens; None where the user did not say.
        usual: what the bundle says, in whose place an answer may have the room that its prompt leaves.
        least: tokens that each answer has to have.
    """

    told: int | None
    usual: int
    least: int = 1


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt's ids, and the tokens that its answer may have; `cut` to how many tokens, if it was."""

    ids: list[int]
    answer: int
    cut: int | None = None


def fit_prompts(
    samples: Sequence[Sample], tokenizer: SFTTokenizer, context: int, src_length: int, length: AnswerLength
) -> list[FittedPrompt]:
    """The prompts in at most `src_length` tokens, and in the bundle's context together with their answers.

    Raises:
        ConfigError: answers that leave no room for a prompt.
        DataError: a prompt that does not fit even without what can be cut of it.
    """
    answer = length.told or length.least
    if answer >= context:
        name = "--max_new_tokens" if length.told else "--min_new_tokens"
        raise ConfigError(f"{name} {answer}: the bundle has a context of {context} tokens, prompts included; lower it")
    return [_fit(sample, tokenizer, context, src_length, length) for sample in samples]


def reports(prompts: Sequence[FittedPrompt], context: int, src_length: int, usual: int) -> Iterator[str]:
    """What to say of prompts that were cut, and of answers that have less room than they usually have."""
    by_context = {prompt.cut for prompt in prompts if prompt.cut is not None and prompt.cut < src_length}
    for limit in sorted({prompt.cut for prompt in prompts if prompt.cut is not None}):
        count = sum(prompt.cut == limit for prompt in prompts)
        why = (
            f"{limit} tokens, for the bundle has a context of {context}"
            if limit in by_context
            else f"--src_length {limit}"
        )
        yield f"{count} of {len(prompts)} prompts were cut to {why}"
    short = sum(prompt.answer < usual for prompt in prompts)
    if short:
        yield f"{short} of {len(prompts)} answers have room for less than {usual} tokens in the bundle's context of {context}"


def _fit(sample: Sample, tokenizer: SFTTokenizer, context: int, src_length: int, length: AnswerLength) -> FittedPrompt:
    from arriero.data.prompt_tokens import fit_prompt

    room = context - (length.told or length.least)
    advice = None
    if room < src_length:
        advice = f"the bundle has a context of {context} with the answer; shorten the prompt or --max_new_tokens"
    limit = min(src_length, room)
    ids, cut = fit_prompt(sample, tokenizer, limit, advice=advice)
    if length.told is not None:
        return FittedPrompt(ids, length.told, limit if cut else None)
    fair = context - max(length.least, min(length.usual, context // 2))
    if cut and fair < limit:  # as it is cut anyway, the answer gets its room
        try:
            ids, _ = fit_prompt(sample, tokenizer, fair)
            limit = fair
        except DataError:
            pass
    return FittedPrompt(ids, min(length.usual, context - len(ids)), limit if cut else None)
