"""SQuAD: its file format and its official metric (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

The metric follows the data set's published `evaluate-v1.1.py`: answers are lower-cased, stripped of punctuation and of the
articles a, an, the, and compared as strings (exact match) or as bags of words (F1), the best over the reference answers.

SQuAD v2 (Rajpurkar et al. 2018, arXiv:1806.03822) has questions that the passage does not answer (`is_impossible`). Their
one reference is the empty string, and a prediction scores 1 if it says nothing, else 0, as in `evaluate-v2.0.py`. A model
that writes text says so by `NO_ANSWER`, which counts as saying nothing.
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

from arriero.data.row_files import MAX_ARRAY_BYTES, utf8_text
from arriero.errors import DataError

NO_ANSWER = "unanswerable"


@dataclass(frozen=True)
class Question:
    """One question on one passage with its reference answers; none if the passage does not answer it."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]


def read_squad(path: Path) -> Iterator[Question]:
    """The questions of a SQuAD JSON file, v1.1 or v2, in file order.

    A question without an answer that is not marked `is_impossible` is skipped: what is right there is not known.

    Raises:
        DataError: if the file is too large, not JSON or not of that format; the place is named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ARRAY_BYTES + 1)
        if len(content) > MAX_ARRAY_BYTES:
            raise DataError(
                f"{path}: a JSON file of more than {MAX_ARRAY_BYTES} bytes, the most that are read; divide it"
            )
        document = json.loads(utf8_text(content, path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise DataError(
            f"{path}: no list 'data' at the top, which SQuAD has; rows are JSON objects, one a line, or one JSON array"
        )
    for a, article in enumerate(document["data"]):
        where = f"{path}: data[{a}]"
        if isinstance(article, dict) and article.keys() - {"title"} and "paragraphs" not in article:
            raise DataError(
                f"{where} has no 'paragraphs', as SQuAD has, but {', '.join(map(str, article))[:200]}: if 'data' holds your "
                "rows, write its list alone into the file, [...]"
            )
        for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            there = f"{where}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, there)
            for q, item in enumerate(_get(paragraph, "qas", list, there)):
                place = f"{there}.qas[{q}]"
                answers = tuple(_get(x, "text", str, f"{place}.answers") for x in _get(item, "answers", list, place))
                impossible = item.get("is_impossible") is True
                if answers or impossible:
                    yield Question(
                        id=str(item.get("id", f"{a}-{p}-{q}")),
                        title=str(article.get("title", "")),
                        context=context,
                        question=_get(item, "question", str, place).strip(),
                        answers=() if impossible else answers,
                    )


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise DataError(f"{where}: no {'list' if kind is list else 'string'} '{key}': SQuAD JSON is expected")
    return value[key]


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the references after normalisation, else 0.0."""
    if is_unanswerable(references):
        return float(_says_nothing(prediction))
    return max(float(normalize_answer(prediction) == normalize_answer(reference)) for reference in references)


def f1_score(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, the best over the references."""
    if is_unanswerable(references):
        return float(_says_nothing(prediction))
    return max(
        _f1(normalize_answer(prediction).split(), normalize_answer(reference).split()) for reference in references
    )


def is_unanswerable(references: Sequence[str]) -> bool:
    """Whether the text holds no answer: the one reference is empty."""
    return tuple(references) == ("",)


def _says_nothing(prediction: str) -> bool:
    return normalize_answer(prediction) in ("", NO_ANSWER)


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)
