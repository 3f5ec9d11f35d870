"""Samples as token sequences whose labels are right by construction.

Prompt and answer are tokenised apart and joined as ids, so that a label can neither be lost to nor leak from a merge of
tokens across the seam. `labels[i]` is the token that position `i` must predict (already shifted), or `IGNORE`.

Of a conversation the assistant's turns are learned. Where the chat template marks them itself by `{% generation %}` blocks,
what these hold is learned, in the template's own words; otherwise what stands between a turn's generation prompt and its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from arriero.data.samples import Message, Sample
from arriero.errors import DataError, TemplateError

IGNORE = -100


class SFTTokenizer(Protocol):
    """What is needed of a tokenizer here."""

    bos_token_id: int | None
    eos_token_id: int | None
    special_tokens: dict[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = ..., allow_special: bool = ...) -> list[int]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def has_chat_template(self) -> bool: ...
    @property
    def marks_generation(self) -> bool: ...
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
    empty_target: int = 0
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens ({self.label_tokens:,} learned), longest {self.longest:,}"
        if self.truncated_context:
            text += f"; {self.truncated_context:,} contexts cut to fit src_length"
        if self.truncated_target:
            text += f"; {self.truncated_target:,} answers cut to fit tgt_length"
        if self.empty_target:
            text += f"; {self.empty_target:,} answers are empty: only their end is learned"
        return text


def _uses_template(sample: Sample, tokenizer: SFTTokenizer) -> bool:
    return sample.chat and tokenizer.has_chat_template()


def _turns(sample: Sample) -> list[Message]:
    """The conversation up to the answer."""
    return [*sample.history, {**sample.turn, "content": sample.prompt}]


def encode_prompt(sample: Sample, tokenizer: SFTTokenizer) -> list[int]:
    """Token ids of the whole prompt, nothing cut."""
    if _uses_template(sample, tokenizer):
        return tokenizer.chat(_turns(sample), add_generation_prompt=True, tools=sample.tools)
    if sample.tools or sample.answer is not None or sample.turn["role"] != "user":
        raise DataError(f"{sample.name} has tool calls, which only a model with a chat template for them can read")
    history = "".join(f"{message['content']}\n\n" for message in sample.history)
    before, after = sample.plain or (sample.before, sample.after)
    ids = tokenizer.encode(history + before + sample.context + after, add_special_tokens=True)
    return [*ids, _eos(tokenizer)] if sample.ends_prompt else ids


def fit_prompt(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The prompt in at most `limit` tokens, its context shortened from the end where needed.

    Returns:
        The ids, and whether the context was cut.

    Raises:
        DataError: if the prompt does not fit even without its context.
    """
    fitted, ids = fit_sample(sample, tokenizer, limit)
    return ids, fitted is not sample


def fit_sample(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[Sample, list[int]]:
    """The sample itself, or one with a shorter context, whose prompt has at most `limit` tokens; and these tokens.

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
    raise DataError(
        f"{sample.name} needs {len(ids)} prompt tokens even without its context: raise --src_length above {limit}"
    )


def encode_target(sample: Sample, tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The answer and the end-of-sequence token in at most `limit` tokens, the end token always kept."""
    assert sample.target is not None
    # a chat template ends its generation prompt with a line break; otherwise a space must part prompt and answer
    closed = _uses_template(sample, tokenizer) or sample.ends_prompt or sample.only_text
    text = sample.target.strip() if closed else " " + sample.target.strip()
    return _ended(tokenizer.encode(text), tokenizer, limit)


def _ended(ids: list[int], tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """An answer's ids and the end token in at most `limit` tokens, and whether the answer was cut."""
    return [*ids[: limit - 1], _eos(tokenizer)], len(ids) > limit - 1


def _eos(tokenizer: SFTTokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token: an answer could never end; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def encode_sample(
    sample: Sample, tokenizer: SFTTokenizer, src_length: int, tgt_length: int, *, train_on: str = "all_assistant"
) -> tuple[Example, bool, bool]:
    """One training row: prompt (not learned) then answer (learned).

    Args:
        train_on: `all_assistant`: earlier assistant turns of a conversation are learned too; `last`: only the answer.

    Returns:
        The example, whether its context was cut, whether its answer was cut.

    Raises:
        DataError: there is no answer, or the prompt does not fit even without its context.
    """
    if sample.target is None:
        raise DataError(f"{sample.name} has no answer to learn from")
    fitted, prompt = fit_sample(sample, tokenizer, src_length)
    history: list[bool] = [False] * len(prompt)
    if sample.only_text:
        answer, target_cut = encode_target(fitted, tokenizer, src_length + tgt_length - len(prompt))
        learned = [True] * len(answer)
    elif not _uses_template(sample, tokenizer):
        answer, target_cut = encode_target(fitted, tokenizer, tgt_length)
        learned = [True] * len(answer)
    elif tokenizer.marks_generation:
        prompt, history, answer, learned, target_cut = _marked_by_template(fitted, prompt, tokenizer, tgt_length)
    else:
        answer, target_cut = (
            encode_target(fitted, tokenizer, tgt_length)
            if sample.answer is None
            else _rendered_answer(fitted, prompt, tokenizer, tgt_length)
        )
        learned = [True] * len(answer)
        if train_on == "all_assistant":
            _mark_history(fitted, tokenizer, prompt, history)
    if train_on == "last":
        history = [False] * len(prompt)
    ids, learned = prompt + answer, history + learned
    labels = [ids[i + 1] if learned[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
    return Example(ids, labels), fitted is not sample, target_cut


def _whole(sample: Sample) -> list[Message]:
    """The conversation with the answer."""
    return [*_turns(sample), sample.answer or {"role": "assistant", "content": sample.target}]


def _marked_by_template(
    sample: Sample, prompt: list[int], tokenizer: SFTTokenizer, limit: int
) -> tuple[list[int], list[bool], list[int], list[bool], bool]:
    """Ids before the answer and which of them are learned, the answer's ids and which of them, whether it was cut.

    The answer begins after the generation prompt, or, where the template writes a finished turn otherwise than it begins an
    open one, with the last block.
    """
    ids, learned = tokenizer.chat_with_generation(_whole(sample), tools=sample.tools)
    end = max((i + 1 for i, inside in enumerate(learned) if inside), default=0)
    start = len(prompt)
    if ids[:start] != prompt:
        start = max((i for i in range(end) if learned[i] and (i == 0 or not learned[i - 1])), default=0)
    if end <= start:
        raise DataError(f"{sample.name}: the answer is in no generation block of the chat template: nothing is learned")
    answer, inside, cut = ids[start:end], learned[start:end], end - start > limit
    if cut:
        answer, _ = _ended(answer, tokenizer, limit)
        inside = [*inside[: limit - 1], True]
    return ids[:start], learned[:start], answer, inside, cut


def _rendered_answer(sample: Sample, prompt: list[int], tokenizer: SFTTokenizer, limit: int) -> tuple[list[int], bool]:
    """The answer with its tool calls as the template writes them, in at most `limit` tokens, and whether it was cut."""
    ids = tokenizer.chat(_whole(sample), add_generation_prompt=False, tools=sample.tools)
    if ids[: len(prompt)] != prompt:
        raise DataError(
            f"{sample.name}: the chat template does not write the assistant's turn where its generation prompt ends, so "
            "the answer's tool calls cannot be found; mark what is learned by {% generation %} blocks in the template"
        )
    answer, eos = ids[len(prompt) :], _eos(tokenizer)
    end = next((i for i in range(len(answer) - 1, -1, -1) if answer[i] == eos), len(answer))
    return _ended(answer[:end], tokenizer, limit)


def _mark_history(sample: Sample, tokenizer: SFTTokenizer, ids: list[int], learned: list[bool]) -> None:
    """Mark the assistant turns of the history: the ids between a turn's generation prompt and the next turn's start."""
    for i, message in enumerate(sample.history):
        if message["role"] != "assistant" or i == 0:  # nothing asks for a first turn
            continue
        start = tokenizer.chat(sample.history[:i], add_generation_prompt=True, tools=sample.tools)
        end = tokenizer.chat(sample.history[: i + 1], add_generation_prompt=False, tools=sample.tools)
        begin = len(start)
        if ids[:begin] != start:
            begin -= 1  # blanks at the turn's beginning can join the prompt's last token; it is learned then
        if ids[:begin] != start[:begin] or ids[: len(end)] != end:
            continue  # a template that rewrites earlier turns: there is no such span, only the last answer is learned
        eos = _eos(tokenizer)
        stop = next((k + 1 for k in range(len(end) - 1, begin, -1) if end[k] == eos), len(end))
        learned[begin:stop] = [True] * (stop - begin)


def check_generation_prompt(tokenizer: SFTTokenizer) -> None:
    """Refuse a template that never writes where the assistant's answer begins: it would be learned after nothing.

    Templates whose user turn ends with that place (`[/INST]`) need no prompt of their own.

    Raises:
        DataError: naming what the template leaves out.
    """
    question: Message = {"role": "user", "content": "question"}
    try:
        opened, closed = (tokenizer.render_chat([question], add_generation_prompt=way) for way in (True, False))
        answered = tokenizer.render_chat(
            [question, {"role": "assistant", "content": "answer"}], add_generation_prompt=False
        )
    except TemplateError:
        return  # it wants other turns; if it fails on the rows too, it is said there
    missing, found, _ = answered.removeprefix(closed).partition("answer")
    if opened == closed and answered.startswith(closed) and found and missing.strip():
        raise DataError(
            f"the chat template has no generation prompt: it writes {missing!r} before an answer and does not with "
            "add_generation_prompt; add {% if add_generation_prompt %} and this text at its end"
        )


def encode_all(
    samples: Iterable[Sample],
    tokenizer: SFTTokenizer,
    src_length: int,
    tgt_length: int,
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
    for sample in samples:
        if not examples and _uses_template(sample, tokenizer):
            check_generation_prompt(tokenizer)
        try:
            example, context_cut, target_cut = encode_sample(
                sample, tokenizer, src_length, tgt_length, train_on=train_on
            )
        except TemplateError as error:
            raise TemplateError(f"{sample.name}: {error}") from error
        examples.append(example)
        report.rows += 1
        report.empty_target += not (sample.target or "").strip() and sample.answer is None
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
