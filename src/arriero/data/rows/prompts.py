"""Rows of one prompt and one answer.

PaddleNLP's three kinds (`context`, `instruction`, `src`) and `prompt` / `completion` are plain text, as they are written.
Alpaca rows are a user turn for a model with a chat template, after `system` and `history` (LLaMA-Factory's columns). Dolly's
rows are `instruction` rows whose input is called `context`. The answer may be called `response` in all of them.
"""

from __future__ import annotations

from arriero.data.rows.conversations import conversation, turns_of, with_system
from arriero.data.rows.questions import answers_of
from arriero.data.rows.values import Row, answer_text, first_text, given_keys, one_key, optional_text
from arriero.data.samples import Message, Sample
from arriero.errors import DataError

# The prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, train.py)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INSTRUCTION, ALPACA_INPUT, ALPACA_RESPONSE = "\n\n### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:"


def context_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`context`, `answers`, `question`: from an answer and its passage to the question."""
    answer = answers_of(row, where)[0]
    question = answer_text(row, "question", where, needs_target)
    target = None if question is None else f"question: {question}"
    return Sample(f"answer: {answer} context: ", first_text(row, "context", where), "", target, ends_prompt=True)


def is_dolly(row: Row) -> bool:
    """Whether a row is one of databricks-dolly-15k: a `context` that is the input, and nothing of questions on a passage."""
    given = given_keys(row)
    return {"instruction", "context"} <= given and not {"answers", "answer", "question"} & given


def _parts(row: Row, where: str, needs_target: bool) -> tuple[str, str, str | None]:
    """Instruction, input ("" if there is none) and answer of a row, or of its first example (self-instruct's `instances`)."""
    instance = row
    if row.get("instances") is not None:
        instances = row["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise DataError(f"{where}: 'instances' must be a list of objects with 'input' and 'output'")
        instance = instances[0]
    target = answer_text(instance, one_key(instance, ("output", "response"), where), where, needs_target)
    extra_key = one_key(instance, ("input", "context"), where) if is_dolly(instance) else "input"
    return first_text(row, "instruction", where), optional_text(instance, extra_key, where), target


def _refuse_turns(row: Row, where: str, way_out: str) -> None:
    """A row that is learned as bare text has no place for a system message and earlier turns."""
    for key in ("system", "history"):
        value = row.get(key)
        if value and not (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where}: '{key}' has no place in bare text, as which such a row is learned: {way_out}")


def instruction_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`instruction`, `input`, `output`: the instruction, and its data below it, as plain text."""
    _refuse_turns(row, where, "give --data_format alpaca, which makes turns of it")
    # PaddleNLP drops `input`; an instruction whose data is missing cannot be learned, so it is kept here
    instruction, extra, target = _parts(row, where, needs_target)
    return Sample(f"{instruction}\n" if extra else "", extra or instruction, "", target)


def alpaca_row(row: Row, where: str, needs_target: bool) -> Sample:
    """The same keys as a user turn, after `system` and the turns of `history`; where the tokenizer has no chat template, in
    Stanford Alpaca's own words, which `system` replaces."""
    instruction, extra, target = _parts(row, where, needs_target)
    system, earlier = optional_text(row, "system", where).strip(), _history(row, where)
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    plain = system or (ALPACA_WITH_INPUT if extra else ALPACA_WITHOUT_INPUT)
    for question, answer in earlier:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        plain += f"{ALPACA_INSTRUCTION}{question}{ALPACA_RESPONSE} {answer}"
    plain += ALPACA_INSTRUCTION + (f"{instruction}{ALPACA_INPUT}" if extra else "")
    return Sample(
        f"{instruction}\n\n" if extra else "",
        extra or instruction,
        "",
        target,
        chat=True,
        history=tuple(turns),
        plain=(plain, ALPACA_RESPONSE),
    )


def _history(row: Row, where: str) -> list[tuple[str, str]]:
    """The earlier turns of a row, `history`: [user, assistant] each."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DataError(f"{where}: 'history' must be a list of [what the user said, what the assistant said]")
    return [(question, answer) for question, answer in history]


def src_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`src`, `tgt`."""
    return Sample("", first_text(row, "src", where), "", answer_text(row, "tgt", where, needs_target))


def prompt_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`prompt`, `completion`: texts, or lists of turns that follow each other (TRL's conversational form)."""
    prompt, key = row.get("prompt"), one_key(row, ("completion", "response"), where)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        completion = row.get(key)
        if completion is None and not needs_target:
            completion = []
        if not isinstance(completion, list):
            raise DataError(f"{where}: '{key}' must be a list of turns, as 'prompt' is")
        turns = with_system(turns_of(prompt, "prompt", where), row, where) + turns_of(completion, key, where)
        return conversation(turns, row.get("tools"), where, needs_target)
    _refuse_turns(row, where, "write it as a conversation under 'messages'")
    return Sample("", first_text(row, "prompt", where), "", answer_text(row, key, where, needs_target))


def text_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`text`: learned from its first word to its end token. Without an answer wanted, it is the prompt."""
    text = first_text(row, "text", where)
    return Sample("", "", "", text) if needs_target else Sample("", text, "", None)
