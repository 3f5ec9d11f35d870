"""The words of a row: its answer as it is learned, and its prompt where no chat template writes the turns."""

from __future__ import annotations

from arriero.data.assistant_turns import unmarked
from arriero.data.samples import Sample
from arriero.errors import DataError


def is_stripped(sample: Sample) -> bool:
    """Whether the blanks around the answer are left out: PaddleNLP's rows and SQuAD's. All others are learned as written."""
    return sample.stripped or sample.ends_prompt or bool(sample.references)


def answer_text(sample: Sample) -> str:
    """The answer that is learned, "" where there is none."""
    target = sample.target or ""
    return target.strip() if is_stripped(sample) else target


def told_answer(sample: Sample, text: str) -> str:
    """A generated answer as it is told: without the one space that parts it from its prompt, in PaddleNLP's rows without any
    blanks around it.
    """
    if is_stripped(sample):
        return text.strip()
    parted = text[:1] == " " and not text[1:2].isspace() and not plain_prompt(sample)[-1:].isspace()
    return text[1:] if parted else text


def joining_space(sample: Sample) -> str:
    """What parts the prompt and the answer without a template: a space, where the row itself has no blank there."""
    if sample.ends_prompt or sample.only_text:
        return ""
    answer, prompt = answer_text(sample), plain_prompt(sample)
    blank = not answer or answer[0].isspace() or prompt[-1:].isspace()
    return " " if is_stripped(sample) or not blank else ""


def plain_prompt(sample: Sample) -> str:
    """The prompt as one text, for a tokenizer without a chat template."""
    history = "".join(f"{message['content']}\n\n" for message in sample.history)
    before, after = sample.plain or (history + sample.before, sample.after)
    return before + sample.context + after


def more_than_text(sample: Sample) -> bool:
    """Whether the answer is a turn with more than its text (calls of tools)."""
    return sample.answer is not None and not {"role", "content"} >= unmarked(sample.answer).keys()


def has_calls(sample: Sample) -> bool:
    """Whether an assistant turn calls tools."""
    return any(message.get("tool_calls") for message in (*sample.history, sample.answer or {}))


def refuse_calls(sample: Sample) -> None:
    """
    Raises:
        DataError: always; for a model that would be shown the row without its tools.
    """
    raise DataError(
        f"{sample.name} has tool calls, which only a model with a chat template for them can read: take one that has it "
        "(such as qwen3-0.6b), put a chat_template.jinja that writes tools into this model's folder, or leave such rows out"
    )


def check_plain(sample: Sample) -> None:
    """Refuse a row that text without a chat template cannot say.

    Raises:
        DataError: it has tools, or several turns, whose roles would be lost.
    """
    if sample.tools or more_than_text(sample) or sample.turn["role"] != "user":
        refuse_calls(sample)
    # squad_qa has plain words of its own, and PaddleNLP's rows are one text there
    if sample.history and sample.plain is None and not (sample.references or sample.stripped):
        raise DataError(
            f"{sample.name} has several turns or a system message, and this model has no chat template to tell them apart: put "
            "a chat_template.jinja into its folder, or write rows of 'prompt' and 'completion'"
        )
