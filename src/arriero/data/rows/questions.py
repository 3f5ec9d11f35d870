"""Questions on a passage as samples: the tasks `squad` (question generation) and `squad_qa` (question answering)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from arriero.data.rows.values import Row, first_text, kind_of
from arriero.data.samples import Sample
from arriero.data.squad import NO_ANSWER, Question
from arriero.errors import DataError

QA_SYSTEM = "Answer with the shortest span of the passage."


def question_generation(question: Question) -> Sample:
    """The seed's `squad` task: from an answer and its passage to the question (finetune_generation.py, `context` rows)."""
    return Sample(
        before=f"answer: {question.answers[0]} context: ",
        context=question.context,
        after="",
        target=f"question: {question.question}",
        ends_prompt=True,
        references=(question.question,),
        id=question.id,
    )


def question_answering(question: Question) -> Sample:
    """The `squad_qa` task: from a passage and a question to a short span.

    What SQuAD v2 says the passage does not answer is answered with `NO_ANSWER`.
    """
    return Sample(
        before="",
        context=question.context,
        after=f"\n\nQuestion: {question.question}\nAnswer:",
        target=question.answers[0] if question.answers else NO_ANSWER,
        chat=True,
        history=({"role": "system", "content": QA_SYSTEM},),
        references=question.answers or ("",),
        id=question.id,
    )


SQUAD_TASKS: dict[str, Callable[[Question], Sample]] = {"squad": question_generation, "squad_qa": question_answering}


def samples_of(questions: Iterable[Question], task: str) -> list[Sample]:
    """The samples of a task; a question without an answer cannot be generated from one, so `squad` leaves it out."""
    make = SQUAD_TASKS[task]
    return [make(question) for question in questions if question.answers or task != "squad"]


def answers_of(row: Row, where: str) -> tuple[str, ...]:
    """Every answer of a row: a string, a list of strings, or the Hub's {"text": [...], "answer_start": [...]}."""
    answers = row.get("answers") if row.get("answers") is not None else row.get("answer")
    if isinstance(answers, dict):
        answers = answers.get("text")
    first = first_text({"answers": answers}, "answers", where)
    return tuple(answer for answer in answers if isinstance(answer, str)) if isinstance(answers, list) else (first,)


def question_from_row(row: Any, where: str, *, needs_target: bool = True) -> Question:
    """A row with `context`, `question` and `answers` as a question.

    It has no answer if it says `is_impossible`, or if the Hub's {"text": []} is empty, as in its `squad_v2`; or if
    it only asks, and `needs_target` is false.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {kind_of(row)}")
    answers = row.get("answers")
    impossible = row.get("is_impossible") is True or (isinstance(answers, dict) and answers.get("text") == [])
    asks = not needs_target and answers is None and row.get("answer") is None
    return Question(
        id=str(row.get("id", where)),
        title=str(row.get("title", "")),
        context=first_text(row, "context", where),
        question=first_text(row, "question", where),
        answers=() if impossible or asks else answers_of(row, where),
    )
