"""Samples as token sequences whose labels are right by construction.

`labels[i]` is the token that position `i` must predict (already shifted), or `IGNORE`. Prompt and answer are encoded apart
(`prompt_tokens`), conversations in the chat template's words (`template_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from arriero.config.row_lengths import RowLengths
from arriero.data.assistant_turns import is_learned
from arriero.data.prompt_tokens import (
    SFTTokenizer,
    encode_prompt,
    encode_target,
    fit_prompt,
    fit_sample,
    uses_template,
)
from arriero.data.rows.report import EncodingReport
from arriero.data.sample_text import more_than_text
from arriero.data.samples import Sample
from arriero.data.spelled_tokens import SpelledTokens
from arriero.data.template_rows import RowParts, check_generation_prompt, template_row, wanted_tokens
from arriero.errors import DataError, TemplateError

IGNORE = -100
BARE_FORMATS = ("instruction", "prompt")  # text, though a chat may be meant


@dataclass(frozen=True)
class Example:
    """One row ready for training: `input_ids` and `labels` of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @cached_property
    def prompt_length(self) -> int:
        """Tokens before the first that is learned (all of them if none is)."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels) - 1)
        return first + 1

    @cached_property
    def label_count(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def encode_sample(
    sample: Sample, tokenizer: SFTTokenizer, lengths: RowLengths, *, train_on: str = "all_assistant"
) -> tuple[Example, bool, bool]:
    """One training row: prompt (not learned) then answer (learned, unless it is marked `UNLEARNED`).

    Args:
        train_on: `all_assistant`: earlier assistant turns of a conversation are learned too; `last`: only the answer.

    Returns:
        The example, whether its context was cut, whether its answer was cut.

    Raises:
        DataError: there is no answer, or the prompt does not fit even without its context.
    """
    if sample.target is None:
        raise DataError(f"{sample.name} has no answer to learn from")
    fitted, (prompt, history, answer, learned, target_cut) = _fitted_row(sample, tokenizer, lengths)
    if train_on == "last":
        history = [False] * len(prompt)
    elif any(history) and not all(map(is_learned, [*sample.history, sample.answer or {}])):
        wanted = wanted_tokens(fitted, tokenizer)
        history = [own and wanted[place] for place, own in enumerate(history)]
    if sample.answer is not None and not is_learned(sample.answer):
        learned = [False] * len(answer)
    ids, learned = prompt + answer, history + learned
    labels = [ids[i + 1] if learned[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
    return Example(ids, labels), fitted is not sample, target_cut


def _fitted_row(sample: Sample, tokenizer: SFTTokenizer, lengths: RowLengths) -> tuple[Sample, RowParts]:
    """The sample, its context shortened where needed, and the parts of its row."""
    fitted, prompt = fit_sample(sample, tokenizer, lengths.longest_prompt)
    if sample.only_text:
        return fitted, _parts(fitted, prompt, tokenizer, lengths.row - len(prompt))
    found = _parts(fitted, prompt, tokenizer, lengths.answer)
    while (
        over := len(found[0]) + len(found[2]) - lengths.row
    ) > 0:  # a template may write a finished turn at more length
        fitted, prompt = fit_sample(sample, tokenizer, len(prompt) - over)
        found = _parts(fitted, prompt, tokenizer, lengths.answer)
    before, _, _, _, cut = found
    if cut and lengths.answer < lengths.longest_answer:
        found = _parts(fitted, prompt, tokenizer, min(lengths.longest_answer, lengths.row - len(before)))
    return fitted, found


def prompt_of_row(sample: Sample, tokenizer: SFTTokenizer, lengths: RowLengths) -> list[int]:
    """The prompt that a training row of this sample has: what its answer is asked with.

    Raises:
        DataError: it does not fit even without its context.
    """
    if sample.target is None:
        return fit_prompt(sample, tokenizer, lengths.prompt)[0]
    return encode_prompt(_fitted_row(sample, tokenizer, lengths)[0], tokenizer)


def _parts(sample: Sample, prompt: list[int], tokenizer: SFTTokenizer, limit: int) -> RowParts:
    """Of a row whose answer has at most `limit` tokens."""
    if not sample.only_text and uses_template(sample, tokenizer):
        return template_row(sample, prompt, tokenizer, limit)
    answer, cut = encode_target(sample, tokenizer, limit)
    return prompt, [False] * len(prompt), answer, [True] * len(answer), cut


def is_empty(sample: Sample) -> bool:
    """Whether the answer says nothing."""
    return not (sample.target or "").strip() and not more_than_text(sample)


def count_format(report: EncodingReport, sample: Sample) -> None:
    """Count a row whose keys told its format."""
    if sample.told:
        report.formats[sample.told] += 1
        report.bare += sample.told in BARE_FORMATS and not sample.chat


def encode_all(
    samples: Iterable[Sample],
    tokenizer: SFTTokenizer,
    lengths: RowLengths,
    on_row: Callable[[], None] | None = None,
    *,
    train_on: str = "all_assistant",
) -> tuple[list[Example], EncodingReport]:
    """Every sample as an example, with the report of what was cut.

    Raises:
        DataError: if no row has a token to learn from, or one cannot be encoded; the row is named.
    """
    examples: list[Example] = []
    report = EncodingReport()
    spelled = SpelledTokens(tokenizer.special_tokens)
    for sample in samples:
        if not examples and uses_template(sample, tokenizer):
            check_generation_prompt(tokenizer)
        try:
            example, context_cut, target_cut = encode_sample(sample, tokenizer, lengths, train_on=train_on)
        except TemplateError as error:
            raise TemplateError(f"{sample.name}: {error}") from error
        examples.append(example)
        spelled.add(sample)
        report.rows += 1
        report.empty_target += is_empty(sample)
        report.unlearned += example.label_count == 0
        count_format(report, sample)
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
    report.spelled = str(spelled)
    return examples, report
