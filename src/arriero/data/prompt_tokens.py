"""The token ids of prompts and of answers without a template.

A prompt has the ids that it has alone, so that a label can neither be lost to nor leak from a merge of tokens across the
seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from arriero.data.assistant_turns import TurnFrame, unmarked
from arriero.data.sample_text import answer_text, check_plain, has_calls, joining_space, plain_prompt, refuse_calls
from arriero.data.samples import Message, Sample
from arriero.errors import DataError


class SFTTokenizer(Protocol):
    """What is needed of a tokenizer here."""

    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens: dict[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = ..., allow_special: bool = ...) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def has_chat_template(self) -> bool: ...
    @property
    def marks_generation(self) -> bool: ...
    @property
    def turn_frame(self) -> TurnFrame: ...
    def writes_tools(self) -> bool: ...
    def writes_calls(self, *, with_tools: bool) -> bool: ...
    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = ...) -> str: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = ...,
        tools: Sequence[Message] | None = ...,
    ) -> list[int]: ...
    def chat_with_generation(
        self, messages: Sequence[Message], *, tools: Sequence[Message] | None = ...
    ) -> tuple[list[int], list[bool]]: ...


def uses_template(sample: Sample, tokenizer: SFTTokenizer) -> bool:
    return sample.chat and tokenizer.has_chat_template()


def turns_before(sample: Sample) -> list[Message]:
    """The conversation up to the answer, as the template gets it."""
    return [*map(unmarked, sample.history), {**sample.turn, "content": sample.prompt}]


def encode_prompt(sample: Sample, tokenizer: SFTTokenizer) -> list[int]:
    """Token ids of the whole prompt, nothing cut.

    Raises:
        DataError: the row has tools or turns that the model's template, or text without one, would lose.
    """
    if uses_template(sample, tokenizer):
        tools = bool(sample.tools)
        if (tools and not tokenizer.writes_tools()) or (
            has_calls(sample) and not tokenizer.writes_calls(with_tools=tools)
        ):
            refuse_calls(sample)
        return tokenizer.chat(turns_before(sample), add_generation_prompt=True, tools=sample.tools)
    check_plain(sample)
    ids = tokenizer.encode(plain_prompt(sample), add_special_tokens=True)
    return [*ids, end_of_sequence(tokenizer)] if sample.ends_prompt else ids


def fit_prompt(
    sample: Sample, tokenizer: SFTTokenizer, limit: int, *, advice: str | None = None
) -> tuple[list[int], bool]:
    """The prompt in at most `limit` tokens, its context shortened from the end where needed.

    Args:
        advice: of the error, where raising --src_length would not help.

    Returns:
        The ids, and whether the context was cut.

    Raises:
        DataError: if the prompt does not fit even without its context.
    """
    fitted, ids = fit_sample(sample, tokenizer, limit, advice=advice)
    return ids, fitted is not sample


def fit_sample(
    sample: Sample, tokenizer: SFTTokenizer, limit: int, *, advice: str | None = None
) -> tuple[Sample, list[int]]:
    """The sample itself, or one with a shorter context, whose prompt has at most `limit` tokens; and these tokens.

    Args:
        advice: of the error.

    Raises:
        DataError: if the prompt does not fit even without its context.
    """
    ids = encode_prompt(sample, tokenizer)
    if len(ids) <= limit:
        return sample, ids
    _, offsets = tokenizer.encode_with_offsets(sample.context)
    keep = len(offsets) - (len(ids) - limit)
    while keep > 0:
        shorter = replace(sample, context=sample.context[: offsets[keep - 1][1]])
        ids = encode_prompt(shorter, tokenizer)
        if len(ids) <= limit:
            return shorter, ids
        keep -= len(ids) - limit
    shorter = replace(sample, context="")
    ids = encode_prompt(shorter, tokenizer)
    if len(ids) <= limit:
        return shorter, ids
    advice = advice or f"raise --src_length (or --max_seq_length) above {limit}"
    raise DataError(f"{sample.name} needs {len(ids)} prompt tokens even without its context: {advice}")


def encode_target(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The answer without a template and the end-of-sequence token in at most `limit` tokens, the end token always kept."""
    assert sample.target is not None
    end, space = end_of_sequence(tokenizer), joining_space(sample)
    text = space + answer_text(sample)
    starts = space or sample.only_text or sample.ends_prompt
    return ended(tokenizer.encode(text) if starts else tokenizer.encode_continuation(text), end, limit)


def ended(ids: list[int], end: int, limit: int) -> tuple[list[int], bool]:
    """An answer's ids and the end token in at most `limit` tokens, and whether the answer was cut."""
    return [*ids[: limit - 1], end], len(ids) > limit - 1


def end_of_sequence(tokenizer: SFTTokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token: an answer could never end; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def turn_end(tokenizer: SFTTokenizer) -> int:
    """The token that ends an answer in the chat template's words."""
    end = tokenizer.special_tokens.get(tokenizer.turn_frame.end)
    return end_of_sequence(tokenizer) if end is None else end
