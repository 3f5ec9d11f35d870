"""Samples as token sequences whose labels are right by construction.

Prompt and answer are tokenised apart and joined as ids, so that a label can neither be lost to nor leak from a merge of
tokens across the seam. `labels[i]` is the token that position `i` must predict (already shifted), or `IGNORE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from arriero.data.samples import Message, Sample
from arriero.errors import DataError

IGNORE = -100


class SFTTokenizer(Protocol):
    """What is needed of a tokenizer here."""

    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens: dict[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = ..., allow_special: bool = ...) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = ...) -> list[int]: ...
    def has_chat_template(self) -> bool: ...


@dataclass(frozen=True)
class Example:
    """One row ready for training: `input_ids` and `labels` of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is learned (all of them if none is)."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels) - 1)
        return first + 1

    @property
    def label_count(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass
class EncodingReport:
    """What happened to the rows: nothing is cut or dropped without being counted here."""

    rows: int = 0
    truncated_context: int = 0
    truncated_target: int = 0
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens ({self.label_tokens:,} learned), longest {self.longest:,}"
        if self.truncated_context:
            text += f"; {self.truncated_context:,} contexts cut to fit src_length"
        if self.truncated_target:
            text += f"; {self.truncated_target:,} answers cut to fit tgt_length"
        return text


def encode_prompt(sample: Sample, tokenizer: SFTTokenizer) -> list[int]:
    """Token ids of the whole prompt, nothing cut."""
    if sample.chat and tokenizer.has_chat_template():
        messages = [*sample.history, {"role": "user", "content": sample.prompt}]
        return tokenizer.chat(messages, add_generation_prompt=True)
    history = "".join(f"{message['content']}\n\n" for message in sample.history)
    ids = tokenizer.encode(history + sample.prompt, add_special_tokens=True)
    return [*ids, _eos(tokenizer)] if sample.ends_prompt else ids


def fit_prompt(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The prompt in at most `limit` tokens, its context shortened from the end where needed.

    Returns:
        The ids, and whether the context was cut.

    Raises:
        DataError: if the prompt does not fit even without its context.
    """
    ids = encode_prompt(sample, tokenizer)
    if len(ids) <= limit:
        return ids, False
    _, offsets = tokenizer.encode_with_offsets(sample.context)
    keep = len(offsets) - (len(ids) - limit)
    while keep > 0:
        shorter = replace(sample, context=sample.context[: offsets[keep - 1][1]])
        ids = encode_prompt(shorter, tokenizer)
        if len(ids) <= limit:
            return ids, True
        keep -= len(ids) - limit
    ids = encode_prompt(replace(sample, context=""), tokenizer)
    if len(ids) <= limit:
        return ids, True
    name = f"row {sample.id}" if sample.id else "a row"
    raise DataError(f"{name} needs {len(ids)} prompt tokens even without its context: raise --src_length above {limit}")


def encode_target(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The answer and the end-of-sequence token in at most `limit` tokens, the end token always kept."""
    assert sample.target is not None
    chat = sample.chat and tokenizer.has_chat_template()
    # a chat template ends its generation prompt with a line break; otherwise a space must part prompt and answer
    text = sample.target.strip() if chat or sample.ends_prompt else " " + sample.target.strip()
    ids = tokenizer.encode(text)
    cut = len(ids) > limit - 1
    return [*ids[: limit - 1], _eos(tokenizer)], cut


def _eos(tokenizer: SFTTokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token: an answer could never end; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_sample(
    sample: Sample, tokenizer: SFTTokenizer, src_length: int, tgt_length: int
) -> tuple[Example, bool, bool]:
    """One training row: prompt (not learned) then answer (learned); earlier assistant turns of a chat are learned too.

    Returns:
        The example, whether its context was cut, whether its answer was cut.
    """
    if sample.target is None:
        raise DataError(f"row {sample.id or sample.prompt[:40]!r} has no answer to learn from")
    prompt, context_cut = fit_prompt(sample, tokenizer, src_length)
    answer, target_cut = encode_target(sample, tokenizer, tgt_length)
    ids = prompt + answer
    learned = [False] * len(prompt) + [True] * len(answer)
    if not context_cut and any(m["role"] == "assistant" for m in sample.history) and tokenizer.has_chat_template():
        _mark_history(sample, tokenizer, ids, learned)
    labels = [ids[i + 1] if learned[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
    return Example(ids, labels), context_cut, target_cut


def _mark_history(sample: Sample, tokenizer: SFTTokenizer, ids: list[int], learned: list[bool]) -> None:
    """Mark the assistant turns of the history: the ids between a turn's generation prompt and the next turn's start."""
    for i, message in enumerate(sample.history):
        if message["role"] != "assistant":
            continue
        start = tokenizer.chat(sample.history[:i], add_generation_prompt=True)
        end = tokenizer.chat(sample.history[: i + 1], add_generation_prompt=False)
        if ids[: len(start)] != start or ids[: len(end)] != end:
            continue  # a template that rewrites earlier turns: there is no such span, only the last answer is learned
        eos = _eos(tokenizer)
        stop = next((k + 1 for k in range(len(end) - 1, len(start), -1) if end[k] == eos), len(end))
        learned[len(start) : stop] = [True] * (stop - len(start))


def encode_all(
    samples: Iterable[Sample],
    tokenizer: SFTTokenizer,
    src_length: int,
    tgt_length: int,
    on_row: Callable[[], None] | None = None,
) -> tuple[list[Example], EncodingReport]:
    """Every sample as an example, with the report of what was cut.

    Raises:
        DataError: if no row has a token to learn from.
    """
    examples: list[Example] = []
    report = EncodingReport()
    for sample in samples:
        example, context_cut, target_cut = encode_sample(sample, tokenizer, src_length, tgt_length)
        examples.append(example)
        report.rows += 1
        report.truncated_context += context_cut
        report.truncated_target += target_cut
        report.tokens += example.length
        report.label_tokens += example.label_count
        report.longest = max(report.longest, example.length)
        if on_row:
            on_row()
    if not examples:
        raise DataError("the data set holds no row")
    if report.label_tokens == 0:
        raise DataError("every label is masked: no row has an answer token to learn from")
    return examples, report
