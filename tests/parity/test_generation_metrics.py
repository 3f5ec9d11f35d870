"""ROUGE and BLEU of answers against the libraries called by hand, and against values that hold by definition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arriero.data.samples import Sample
from arriero.training.generation_metrics import Answer, score

ROWS = [
    ("the mule carries the load uphill", "the mule carries a heavy load uphill"),
    ("snow is white and cold today", "today the snow is white and cold"),
    ("nothing alike here at all", "rivers run to the sea"),
]


def answers(rows: list[tuple[str, tuple[str, ...]]]) -> list[Answer]:
    return [Answer(Sample("", "p", "", target=refs[0], references=refs), text) for text, refs in rows]


def test_one_reference_as_the_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    scoring = pytest.importorskip("rouge_score.rouge_scorer")
    found = score(answers([(text, (reference,)) for text, reference in ROWS]))
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = scoring.RougeScorer([name])
        own = [scorer.score(reference, text)[name].fmeasure for text, reference in ROWS]
        assert found[name] == pytest.approx(100 * sum(own) / len(own))
    bleu = sacrebleu.corpus_bleu([text for text, _ in ROWS], [[reference for _, reference in ROWS]])
    assert found["bleu4"] == pytest.approx(bleu.score)


def test_any_reference_may_be_met() -> None:
    rows = [(text, (reference, text)) for text, reference in ROWS[:2]] + [
        ("just one reference here", ("just one reference here",))
    ]
    found = score(answers(rows))
    assert found == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100, "bleu4": 100})


def test_squad_v2_says_both_kinds_as_the_official_script() -> None:
    """`make_eval_dict` of evaluate-v2.0.py: means over the questions with an answer, and over those without."""
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("Ann Lee", ("Ann Lee", "Ann")),
        ("big Ann Lee", ("Ann Lee",)),  # 2 common words: precision 2/3, recall 1
        ("nobody", ("Ann Lee",)),
        ("", ("",)),
        ("Ann", ("",)),
        ("", ("",)),
        ("", ("",)),
    ]
    made = [Answer(replace(answer.sample, chat=True), answer.text) for answer in answers(rows)]
    assert score(made) == pytest.approx(
        {
            "exact_match": 100 * 4 / 7,
            "f1": 100 * 4.8 / 7,
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * 1.8 / 3,
            "HasAns_total": 3,
            "NoAns_exact": 75,
            "NoAns_f1": 75,
            "NoAns_total": 4,
        }
    )
    assert set(score(made[:3])) == {"exact_match", "f1"}  # SQuAD v1
    assert "HasAns_exact" not in score(made[3:])
