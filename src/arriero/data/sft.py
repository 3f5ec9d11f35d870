"""Samples as token sequences whose labels are right by construction.

A prompt has the ids that it has alone, so that a label can neither be lost to nor leak from a merge of tokens across the
seam. `labels[i]` is the token that position `i` must predict (already shifted), or `IGNORE`.

Of a conversation the assistant's turns are learned, in the chat template's own words: what its `{% generation %}` blocks
hold, and of a template without such blocks what stands between a turn's generation prompt and its end (`assistant_turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from arriero.data.assistant_turns import THOUGHT_OPENING, UNLEARNED, TurnFrame, is_learned, unmarked
from arriero.data.rows.report import EncodingReport
from arriero.data.sample_text import (
    answer_text,
    check_plain,
    has_calls,
    joining_space,
    more_than_text,
    plain_prompt,
    refuse_calls,
)
from arriero.data.samples import Message, Sample
from arriero.data.spelled_tokens import SpelledTokens
from arriero.errors import DataError, TemplateError

IGNORE = -100
BARE_FORMATS = ("instruction", "prompt")  # text, though a chat may be meant


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


def _uses_template(sample: Sample, tokenizer: SFTTokenizer) -> bool:
    return sample.chat and tokenizer.has_chat_template()


def _turns(sample: Sample) -> list[Message]:
    """The conversation up to the answer, as the template gets it."""
    return [*map(unmarked, sample.history), {**sample.turn, "content": sample.prompt}]


def encode_prompt(sample: Sample, tokenizer: SFTTokenizer) -> list[int]:
    """Token ids of the whole prompt, nothing cut.

    Raises:
        DataError: the row has tools or turns that the model's template, or text without one, would lose.
    """
    if _uses_template(sample, tokenizer):
        tools = bool(sample.tools)
        if (tools and not tokenizer.writes_tools()) or (
            has_calls(sample) and not tokenizer.writes_calls(with_tools=tools)
        ):
            refuse_calls(sample)
        return tokenizer.chat(_turns(sample), add_generation_prompt=True, tools=sample.tools)
    check_plain(sample)
    ids = tokenizer.encode(plain_prompt(sample), add_special_tokens=True)
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
    """The answer without a template and the end-of-sequence token in at most `limit` tokens, the end token always kept."""
    assert sample.target is not None
    end, space = _eos(tokenizer), joining_space(sample)
    text = space + answer_text(sample)
    starts = space or sample.only_text or sample.ends_prompt
    return _ended(tokenizer.encode(text) if starts else tokenizer.encode_continuation(text), end, limit)


def _ended(ids: list[int], end: int, limit: int) -> tuple[list[int], bool]:
    """An answer's ids and the end token in at most `limit` tokens, and whether the answer was cut."""
    return [*ids[: limit - 1], end], len(ids) > limit - 1


def _eos(tokenizer: SFTTokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token: an answer could never end; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _turn_end(tokenizer: SFTTokenizer) -> int:
    """The token that ends an answer in the chat template's words."""
    end = tokenizer.special_tokens.get(tokenizer.turn_frame.end)
    return _eos(tokenizer) if end is None else end


def encode_sample(
    sample: Sample, tokenizer: SFTTokenizer, src_length: int, tgt_length: int, *, train_on: str = "all_assistant"
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
    fitted, prompt = fit_sample(sample, tokenizer, src_length)
    history: list[bool] = [False] * len(prompt)
    if sample.only_text:
        answer, target_cut = encode_target(fitted, tokenizer, src_length + tgt_length - len(prompt))
        learned = [True] * len(answer)
    elif not _uses_template(sample, tokenizer):
        answer, target_cut = encode_target(fitted, tokenizer, tgt_length)
        learned = [True] * len(answer)
    else:
        prompt, history, answer, learned, target_cut = _by_template(fitted, prompt, tokenizer, tgt_length)
    if train_on == "last":
        history = [False] * len(prompt)
    elif any(history) and not all(map(is_learned, [*sample.history, sample.answer or {}])):
        wanted = _wanted(fitted, tokenizer)
        history = [own and wanted[place] for place, own in enumerate(history)]
    if sample.answer is not None and not is_learned(sample.answer):
        learned = [False] * len(answer)
    ids, learned = prompt + answer, history + learned
    labels = [ids[i + 1] if learned[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
    return Example(ids, labels), fitted is not sample, target_cut


def is_empty(sample: Sample) -> bool:
    """Whether the answer says nothing."""
    return not (sample.target or "").strip() and not more_than_text(sample)


def _whole(sample: Sample) -> list[Message]:
    """The conversation with the answer, as the template gets it."""
    assert sample.target is not None
    if sample.answer is not None and more_than_text(sample):
        return [*_turns(sample), unmarked(sample.answer)]
    return [*_turns(sample), {"role": "assistant", "content": answer_text(sample)}]


def _wanted(sample: Sample, tokenizer: SFTTokenizer) -> list[bool]:
    """Of each token of a conversation, whether it is of an assistant turn that is to be learned.

    Where the template marks what the assistant says, a turn's tokens are those that the conversation up to the next such turn
    has more than that up to it.

    Raises:
        DataError: the template writes an earlier turn otherwise when others follow it, so they cannot be told apart.
    """
    turns, tools = _whole(sample), sample.tools
    given = [*sample.history, turns[-2], sample.answer or turns[-1]]
    ids, said = tokenizer.chat_with_generation(turns, tools=tools)
    if not tokenizer.marks_generation:
        marked = [turn if is_learned(mark) else {**turn, **UNLEARNED} for turn, mark in zip(turns, given, strict=True)]
        same, wanted = tokenizer.chat_with_generation(marked, tools=tools)
        if same == ids:
            return wanted
    else:
        places = [place for place, own in enumerate(said) if own]
        wanted, done = list(said), 0
        own_turns = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        for number, following in pairwise([*own_turns, len(turns)]):
            part, own = tokenizer.chat_with_generation(turns[:following], tools=tools)
            spoken = [token for token, inside in zip(part, own, strict=True) if inside]
            if spoken != [ids[place] for place in places[: len(spoken)]]:
                break
            for place in [] if is_learned(given[number]) else places[done : len(spoken)]:
                wanted[place] = False
            done = len(spoken)
        else:
            return wanted
    raise DataError(
        f"{sample.name}: the chat template writes an earlier turn otherwise when others follow it, so those of 'weight' 0 or "
        "'train' false cannot be found: give --train_on last, which learns the last one only"
    )


def _by_template(
    sample: Sample, prompt: list[int], tokenizer: SFTTokenizer, limit: int
) -> tuple[list[int], list[bool], list[int], list[bool], bool]:
    """Ids before the answer and which of them are learned, the answer's ids and which of them, whether it was cut.

    The answer begins after the generation prompt, or, where the template writes a finished turn otherwise than it begins an
    open one, where the last turn does.
    """
    own, end_id, start = tokenizer.marks_generation, _turn_end(tokenizer), len(prompt)
    ids, learned = _conversation(sample, prompt, tokenizer)
    end = max((i + 1 for i, inside in enumerate(learned) if inside), default=0)
    if ids[:start] != prompt:
        thought = "" if own else _thought(sample, prompt, tokenizer)
        joined = ids[: start - 1] == prompt[:-1]  # the answer's beginning and the prompt's last token are one
        if not own and (thought or joined):
            answer, cut = _ended(tokenizer.encode(thought or answer_text(sample)), end_id, limit)
            return prompt, _history(ids, learned, prompt), answer, [True] * len(answer), cut
        start = max((i for i in range(end) if learned[i] and (i == 0 or not learned[i - 1])), default=0)
    elif not own and end <= start:  # where the last turn is could not be told, but for where it begins
        end = next((i + 1 for i in range(len(ids) - 1, start - 1, -1) if ids[i] == end_id), len(ids))
        learned[start:end] = [True] * (end - start)
    if end <= start:
        raise DataError(
            f"{sample.name}: the answer is in no generation block of the chat template: nothing is learned"
            if own
            else f"{sample.name}: the chat template does not write the answer where its generation prompt ends, so it cannot "
            "be found; mark what is learned by {% generation %} blocks in the template"
        )
    answer, inside = ids[start:end], learned[start:end]
    if not own and answer[-1] != end_id:  # a template that ends no turn
        answer, inside = [*answer, end_id], [*inside, True]
    cut = len(answer) > limit
    if cut:
        answer, inside = _ended(answer, end_id, limit)[0], [*inside[: limit - 1], True]
    return ids[:start], learned[:start], answer, inside, cut


def _conversation(sample: Sample, prompt: list[int], tokenizer: SFTTokenizer) -> tuple[list[int], list[bool]]:
    """The ids of the whole conversation, and which are the assistant's; none are told where the prompt's end tells it all."""
    if not tokenizer.marks_generation and not any(message["role"] == "assistant" for message in sample.history):
        ids = tokenizer.chat(_whole(sample), add_generation_prompt=False, tools=sample.tools)
        if ids[: len(prompt)] == prompt:
            return ids, [False] * len(ids)
    return tokenizer.chat_with_generation(_whole(sample), tools=sample.tools)


def _history(ids: list[int], learned: list[bool], prompt: list[int]) -> list[bool]:
    """Which ids of a prompt are learned, by those of a whole conversation that begins like it."""
    same = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
    while same and learned[same - 1]:  # of the answer itself
        same -= 1
    return [*learned[:same], *[False] * (len(prompt) - same)]


def _thought(sample: Sample, prompt: list[int], tokenizer: SFTTokenizer) -> str:
    """An answer that thinks first, without the mark at its beginning, if that is what its prompt ends with."""
    target = answer_text(sample).lstrip()
    mark = tokenizer.encode(f"{THOUGHT_OPENING}\n")
    begins = target.startswith(THOUGHT_OPENING) and prompt[-len(mark) :] == mark
    return target.removeprefix(THOUGHT_OPENING).lstrip() if begins else ""


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
    spelled = SpelledTokens(tokenizer.special_tokens)
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
        spelled.add(sample)
        report.rows += 1
        report.empty_target += is_empty(sample)
        report.unlearned += example.label_count == 0
        if sample.told:
            report.formats[sample.told] += 1
            report.bare += sample.told in BARE_FORMATS and not sample.chat
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
