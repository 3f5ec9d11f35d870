"""SQuAD v1.1: its file format and its official metric (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

The metric follows the data set's published `evaluate-v1.1.py`: answers are lower-cased, stripped of punctuation and of the
articles a, an, the, and compared as strings (exact match) or as bags of words (F1), the best over the reference answers.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import DataError


@dataclass(frozen=True)
class Question:
    """One question on one passage with its reference answers."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]


def read_squad(path: Path) -> Iterator[Question]:
    """The questions of a SQuAD v1.1 JSON file, in file order; questions without an answer are skipped.

    Raises:
        DataError: if the file is not JSON or not of that format; the place is named.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise DataError(f"{path}: no list 'data' at the top: SQuAD v1.1 JSON is expected")
    for a, article in enumerate(document["data"]):
        where = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            there = f"{where}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, there)
            for q, item in enumerate(_get(paragraph, "qas", list, there)):
                place = f"{there}.qas[{q}]"
                answers = tuple(_get(x, "text", str, f"{place}.answers") for x in _get(item, "answers", list, place))
                if answers:
                    yield Question(
                        id=str(item.get("id", f"{a}-{p}-{q}")),
                        title=str(article.get("title", "")),
                        context=context,
                        question=_get(item, "question", str, place).strip(),
                        answers=answers,
                    )


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise DataError(f"{where}: no {kind.__name__} '{key}': SQuAD v1.1 JSON is expected")
    return value[key]


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the references after normalisation, else 0.0."""
    return max(float(normalize_answer(prediction) == normalize_answer(reference)) for reference in references)


def f1_score(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, the best over the references."""
    return max(
        _f1(normalize_answer(prediction).split(), normalize_answer(reference).split()) for reference in references
    )


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)
