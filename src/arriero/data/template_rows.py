"""Rows in a chat template's words, and which of their tokens the assistant says.

Of a conversation the assistant's turns are learned, in the chat template's own words: what its `{% generation %}` blocks
hold, and of a template without such blocks what stands between a turn's generation prompt and its end (`assistant_turns`).
"""

from __future__ import annotations

from itertools import pairwise

from arriero.data.assistant_turns import THOUGHT_OPENING, UNLEARNED, is_learned, unmarked
from arriero.data.prompt_tokens import SFTTokenizer, ended, turn_end, turns_before
from arriero.data.sample_text import answer_text, more_than_text
from arriero.data.samples import Message, Sample
from arriero.errors import DataError, TemplateError

# Ids before the answer and which of them are learned, the answer's ids and which of them, whether it was cut.
RowParts = tuple[list[int], list[bool], list[int], list[bool], bool]


def _whole(sample: Sample) -> list[Message]:
    """The conversation with the answer, as the template gets it."""
    assert sample.target is not None
    if sample.answer is not None and more_than_text(sample):
        return [*turns_before(sample), unmarked(sample.answer)]
    return [*turns_before(sample), {"role": "assistant", "content": answer_text(sample)}]


def wanted_tokens(sample: Sample, tokenizer: SFTTokenizer) -> list[bool]:
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


def template_row(sample: Sample, prompt: list[int], tokenizer: SFTTokenizer, limit: int) -> RowParts:
    """The answer begins after the generation prompt, or, where the template writes a finished turn otherwise than it begins an
    open one, where the last turn does.
    """
    own, end_id, start = tokenizer.marks_generation, turn_end(tokenizer), len(prompt)
    ids, learned = _conversation(sample, prompt, tokenizer)
    end = max((i + 1 for i, inside in enumerate(learned) if inside), default=0)
    if ids[:start] != prompt:
        thought = "" if own else _thought(sample, prompt, tokenizer)
        joined = ids[: start - 1] == prompt[:-1]  # the answer's beginning and the prompt's last token are one
        if not own and (thought or joined):
            answer, cut = ended(tokenizer.encode(thought or answer_text(sample)), end_id, limit)
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
        answer, inside = ended(answer, end_id, limit)[0], [*inside[: limit - 1], True]
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
