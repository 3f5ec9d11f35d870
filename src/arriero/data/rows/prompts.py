"""Rows of one prompt and one answer.

PaddleNLP's three kinds (`context`, `instruction`, `src`) and `prompt` / `completion` are plain text, as they are written.
Alpaca rows are a user turn for a model with a chat template.
"""

from __future__ import annotations

from arriero.data.rows.conversations import conversation, turns_of
from arriero.data.rows.questions import answers_of
from arriero.data.rows.values import Row, answer_text, first_text, optional_text
from arriero.data.samples import Sample
from arriero.errors import DataError

# The prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, train.py)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
ALPACA_RESPONSE = "\n\n### Response:"


def context_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`context`, `answers`, `question`: from an answer and its passage to the question."""
    answer = answers_of(row, where)[0]
    question = answer_text(row, "question", where, needs_target)
    target = None if question is None else f"question: {question}"
    return Sample(f"answer: {answer} context: ", first_text(row, "context", where), "", target, ends_prompt=True)


def _instance(row: Row, where: str) -> Row:
    """`input` and `output` of an instruction: in the row, or of its first example (self-instruct's `instances`)."""
    if "instances" not in row:
        return row
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise DataError(f"{where}: 'instances' must be a list of objects with 'input' and 'output'")
    return instances[0]


def instruction_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`instruction`, `input`, `output`: the instruction, and its data below it, as plain text."""
    instance = _instance(row, where)
    target = answer_text(instance, "output", where, needs_target)
    # PaddleNLP drops `input`; an instruction whose data is missing cannot be learned, so it is kept here
    extra = optional_text(instance, "input", where)
    instruction = first_text(row, "instruction", where)
    return Sample(f"{instruction}\n" if extra else "", extra or instruction, "", target)


def alpaca_row(row: Row, where: str, needs_target: bool) -> Sample:
    """The same keys as a user turn; where the tokenizer has no chat template, in Stanford Alpaca's own words."""
    instance = _instance(row, where)
    target = answer_text(instance, "output", where, needs_target)
    extra = optional_text(instance, "input", where)
    instruction = first_text(row, "instruction", where)
    if extra:
        plain = (ALPACA_WITH_INPUT.replace("{instruction}", instruction), ALPACA_RESPONSE)
        return Sample(f"{instruction}\n\n", extra, "", target, chat=True, plain=plain)
    return Sample("", instruction, "", target, chat=True, plain=(ALPACA_WITHOUT_INPUT, ALPACA_RESPONSE))


def src_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`src`, `tgt`."""
    return Sample("", first_text(row, "src", where), "", answer_text(row, "tgt", where, needs_target))


def prompt_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`prompt`, `completion`: texts, or lists of turns that follow each other (TRL's conversational form)."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        completion = row.get("completion")
        if completion is None and not needs_target:
            completion = []
        if not isinstance(completion, list):
            raise DataError(f"{where}: 'completion' must be a list of turns, as 'prompt' is")
        turns = turns_of(prompt, "prompt", where) + turns_of(completion, "completion", where)
        return conversation(turns, row.get("tools"), where, needs_target)
    return Sample("", first_text(row, "prompt", where), "", answer_text(row, "completion", where, needs_target))


def text_row(row: Row, where: str, needs_target: bool) -> Sample:
    """`text`: learned from its first word to its end token. Without an answer wanted, it is the prompt."""
    text = first_text(row, "text", where)
    return Sample("", "", "", text) if needs_target else Sample("", text, "", None)
