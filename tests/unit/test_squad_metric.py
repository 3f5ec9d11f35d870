"""SQuAD's metric on examples worked by hand from the published evaluate-v1.1.py, and its file format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.data import squad as squad_module
from arriero.data.squad import exact_match, f1_score, normalize_answer, read_squad
from arriero.errors import DataError


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("a cat, an ape & the dog", "cat ape dog"),
        ("don't", "dont"),
        ("theatre and another anthem", "theatre and another anthem"),  # articles as whole words only
        ("the-a", "thea"),  # punctuation goes first, so no article is left to drop
        ("  2½ sacks ", "2½ sacks"),
        ("U.S.A.", "usa"),
        ("The", ""),
        ("Ångström", "ångström"),
        ("one\ntwo\tthree", "one two three"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation is dropped, as in the original
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "references", "match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("the denver broncos.", ["Denver Broncos", "Broncos"], 1.0, 1.0),
        # 2 common words; precision 2/3, recall 2/2
        ("big Denver Broncos", ["Denver Broncos"], 0.0, 0.8),
        # 1 common word; precision 1/1, recall 1/4
        ("Carolina", ["The Carolina Panthers of Charlotte"], 0.0, 2 * 1 * 0.25 / 1.25),
        # the best of the references counts
        ("in 1890", ["the year 1890", "1890"], 0.0, 2 * 0.5 * 1 / 1.5),
        # a repeated word counts as often as both hold it: 1 of 3 and 1 of 1
        ("x x x", ["x"], 0.0, 2 * (1 / 3) * 1 / (4 / 3)),
        ("x x y", ["x x z"], 0.0, 2 / 3),
        ("nothing alike", ["Denver Broncos"], 0.0, 0.0),
        ("", ["Denver"], 0.0, 0.0),
        ("the", ["a"], 1.0, 0.0),  # both empty after normalisation: equal strings, no common word
        ("ice-cream", ["ice cream"], 0.0, 0.0),  # "icecream"
    ],
)
def test_scores(prediction: str, references: list[str], match: float, f1: float) -> None:
    assert exact_match(prediction, references) == match
    assert f1_score(prediction, references) == pytest.approx(f1)


def squad(**changes: Any) -> dict[str, Any]:
    item = {"id": "q1", "question": " Who? ", "answers": [{"text": "Ann", "answer_start": 0}], **changes}
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Ann sang.", "qas": [item]}]}]}


def test_reads_the_format(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    document = squad(answers=[{"text": "Ann", "answer_start": 0}, {"text": "Ann sang", "answer_start": 0}])
    document["data"].append(squad(id="q2", answers=[])["data"][0])  # SQuAD 2.0's questions without an answer
    document["data"].append(squad(id="q3")["data"][0])
    path.write_text(json.dumps(document), encoding="utf-8")
    first, second = read_squad(path)
    assert (first.id, first.title, first.context, first.question) == ("q1", "T", "Ann sang.", "Who?")
    assert first.answers == ("Ann", "Ann sang")
    assert second.id == "q3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "no list 'data' at the top"),
        ('{"data": 3}', "no list 'data' at the top"),
        ('{"data": [', "not a readable JSON file"),
        ('{"data": ' + "[" * 100_000, "not a readable JSON file"),
        ('{"data": ' + "9" * 5000 + "}", "not a readable JSON file"),
        (json.dumps({"data": [{"title": "x"}]}), r"data\[0\]: no list 'paragraphs'"),
        (
            json.dumps({"data": [{"instruction": "Add.", "output": "3"}]}),
            r"data\[0\] has no 'paragraphs', as SQuAD has, but instruction, output: .*write its list alone",
        ),
        (json.dumps({"data": [3]}), r"data\[0\]: no list 'paragraphs'"),
        (json.dumps({"data": [{"paragraphs": [{"qas": []}]}]}), r"data\[0\]\.paragraphs\[0\]: no string 'context'"),
        (json.dumps(squad(answers="Ann")), r"qas\[0\]: no list 'answers'"),
        (json.dumps(squad(answers=[{"answer_start": 0}])), r"qas\[0\]\.answers: no string 'text'"),
        (json.dumps(squad(question=None)), r"qas\[0\]: no string 'question'"),
    ],
)
def test_a_wrong_place_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        list(read_squad(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad()), encoding="utf-8")
    size = path.stat().st_size
    monkeypatch.setattr(squad_module, "MAX_ARRAY_BYTES", size)
    assert len(list(read_squad(path))) == 1
    monkeypatch.setattr(squad_module, "MAX_ARRAY_BYTES", size - 1)
    with pytest.raises(DataError, match=rf"train\.json: a JSON file of more than {size - 1} bytes"):
        list(read_squad(path))
