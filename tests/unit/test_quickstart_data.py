"""The data that ships: what the project promises about it, counted here."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from arriero.data.sources import read_samples

FOLDER = resources.files("arriero") / "assets" / "quickstart"


def paragraphs(split: str) -> list[tuple[str, dict[str, Any]]]:
    document = json.loads((FOLDER / f"{split}.json").read_text(encoding="utf-8"))
    return [(article["title"], paragraph) for article in document["data"] for paragraph in article["paragraphs"]]


def questions(split: str) -> list[tuple[str, dict[str, Any]]]:
    return [(paragraph["context"], qa) for _, paragraph in paragraphs(split) for qa in paragraph["qas"]]


def words(text: str) -> set[tuple[str, ...]]:
    """Every run of 8 words."""
    parts = text.lower().split()
    return {tuple(parts[i : i + 8]) for i in range(len(parts) - 7)}


def test_sizes() -> None:
    assert len(questions("train")) >= 1000
    assert len(questions("dev")) >= 200


def test_passages_and_articles_are_disjoint() -> None:
    train, dev = paragraphs("train"), paragraphs("dev")
    assert not {p["context"] for _, p in train} & {p["context"] for _, p in dev}
    assert not {title for title, _ in train} & {title for title, _ in dev}
    seen = set().union(*(words(p["context"]) for _, p in train))
    for _, paragraph in dev:
        assert not words(paragraph["context"]) & seen, "no run of 8 words of a held-out passage is in the training set"


def test_answers_are_spans_where_they_say() -> None:
    for split in ("train", "dev"):
        for context, qa in questions(split):
            assert qa["question"].strip().endswith("?"), qa["id"]
            assert qa["answers"], qa["id"]
            for answer in qa["answers"]:
                start = answer["answer_start"]
                assert answer["text"], qa["id"]
                assert context[start : start + len(answer["text"])] == answer["text"], qa["id"]


def test_ids_and_questions_are_unique() -> None:
    everything = questions("train") + questions("dev")
    assert len({qa["id"] for _, qa in everything}) == len(everything)
    assert len({(context, qa["question"]) for context, qa in everything}) == len(everything)
    assert not {qa["question"] for _, qa in questions("train")} & {qa["question"] for _, qa in questions("dev")}


def test_every_question_is_read() -> None:
    for split in ("train", "dev"):
        from pathlib import Path

        path = Path(str(FOLDER / f"{split}.json"))
        assert len(read_samples(path, "squad_qa")) == len(read_samples(path, "squad")) == len(questions(split))


def test_the_licence_is_stated() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 3.0" in text
    assert "Wikipedia" in text
