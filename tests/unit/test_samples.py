"""Rows of every kind as samples, and wrong rows by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.commands.prompt_rows import read_prompts
from arriero.data.row_files import read_json
from arriero.data.rows.formats import sample_from_row
from arriero.data.rows.questions import QA_SYSTEM
from arriero.data.sources import find_splits, load_samples, read_samples
from arriero.errors import ConfigError, DataError


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_context_rows_ask_for_the_question() -> None:
    row = {"context": "The Broncos won.", "answers": ["linebacker", "x"], "question": ["What?", "y"]}
    sample = sample_from_row(row, "f:1")
    assert sample.prompt == "answer: linebacker context: The Broncos won."
    assert sample.context == "The Broncos won."
    assert sample.target == "question: What?"
    assert sample.ends_prompt
    assert not sample.chat


@pytest.mark.parametrize("answers", ["Ann", ["Ann"], {"text": ["Ann", "b"], "answer_start": [0, 1]}])
def test_answers_in_all_three_shapes(answers: Any) -> None:
    for key in ("answers", "answer"):
        sample = sample_from_row({"context": "c", key: answers, "question": "q"}, "f:1")
        assert sample.prompt == "answer: Ann context: c"


def test_instruction_rows_keep_their_input() -> None:
    plain = sample_from_row({"instruction": "Sum up.", "output": "Done."}, "f:1")
    assert (plain.prompt, plain.target) == ("Sum up.", "Done.")
    extra = sample_from_row({"instruction": "Sum up.", "input": "A text.", "output": "Done."}, "f:1")
    assert extra.prompt == "Sum up.\nA text."
    assert extra.context == "A text.", "the data may be shortened, the instruction not"


def test_src_rows() -> None:
    sample = sample_from_row({"src": ["in", "second"], "tgt": "out"}, "f:1")
    assert (sample.prompt, sample.target, sample.chat) == ("in", "out", False)


def test_conversations() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell."},
    ]
    sample = sample_from_row({"messages": turns}, "f:1")
    assert (sample.prompt, sample.target, sample.chat) == ("Bye", "Farewell.", True)
    assert list(sample.history) == turns[:3]


def test_keys_win_in_the_seeds_order() -> None:
    row = {"src": "s", "tgt": "t", "instruction": "i", "output": "o", "context": "c", "answers": "a", "question": "q"}
    assert sample_from_row(row, "f:1").context == "c"
    del row["context"]
    assert sample_from_row(row, "f:1").prompt == "i"


def test_prediction_rows_need_no_answer() -> None:
    rows: list[dict[str, Any]] = [
        {"src": "in"},
        {"instruction": "do"},
        {"context": "c", "answers": "a"},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    for row in rows:
        assert sample_from_row(row, "f:1", needs_target=False).target is None
        with pytest.raises(DataError, match=r"^f:1: "):
            sample_from_row(row, "f:1")


WRONG: list[tuple[Any, str]] = [
    (["a list"], "a JSON object is expected, found a list"),
    ({}, "found nothing"),
    ({"question": "x", "response": "y"}, "found question, response"),
    ({"src": 3, "tgt": "x"}, "'src' must be a string"),
    ({"src": [], "tgt": "x"}, "has no 'src'"),
    ({"src": "x"}, "has no 'tgt'"),
    ({"context": "c", "question": "q"}, "has no 'answers'"),
    ({"instruction": "i", "input": 5, "output": "o"}, "'input' must be a string"),
    ({"messages": []}, "'messages' must be a list of turns"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] needs"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last turn must be the assistant's"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "a 'user' turn is expected"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_a_wrong_row_is_named_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    good = {"src": "a", "tgt": "b"}
    path = write(tmp_path / "train.jsonl", [good, good, row, good])
    with pytest.raises(DataError, match=message) as error:
        read_samples(path, None)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b'{"src": "a", "tgt"', b"nonsense", b"[" * 100_000])
def test_a_line_that_is_not_json_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"src": "a", "tgt": "b"}\n\n' + line + b"\n")  # blank lines are skipped but counted
    with pytest.raises(DataError) as error:
        read_samples(path, None)
    assert str(error.value).startswith(f"{path}:3: not JSON")
    assert "\n" not in str(error.value)


def test_jsonl_without_a_last_line_break_and_with_windows_ones(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes('{"src": "é"}\r\n   \r\n{"src": "b"}'.encode())
    assert list(read_json(path)) == [(f"{path}:1", {"src": "é"}), (f"{path}:3", {"src": "b"})]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n", '{"version": "1.1", "data": []}'])
def test_an_empty_data_set_is_refused(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_samples(path, None)
    assert str(path) in str(error.value)


def squad(path: Path, *, indent: int | None = None) -> Path:
    qas = [
        {
            "id": "q7",
            "question": "Who sang?",
            "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann B", "answer_start": 0}],
        }
    ]
    document = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Ann B sang.", "qas": qas}]}]}
    path.write_text(json.dumps(document, indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_files_as_both_tasks(indent: int | None, tmp_path: Path) -> None:
    path = squad(tmp_path / "train.json", indent=indent)
    for task in (None, "squad"):
        (sample,) = read_samples(path, task)
        assert sample.prompt == "answer: Ann context: Ann B sang."
        assert sample.target == "question: Who sang?"
        assert sample.ends_prompt
    (sample,) = read_samples(path, "squad_qa")
    assert sample.prompt == "Ann B sang.\n\nQuestion: Who sang?\nAnswer:"
    assert (sample.target, sample.references) == ("Ann", ("Ann", "Ann B"))
    assert sample.chat
    assert list(sample.history) == [{"role": "system", "content": QA_SYSTEM}]
    assert sample.id == "q7"


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    """The seed's own data files are JSON lines named .json."""
    rows = [{"context": "Ann B sang.", "question": "Who sang?", "answers": {"text": ["Ann"]}}] * 2
    path = write(tmp_path / "train.json", rows)
    assert [sample.target for sample in read_samples(path, "squad")] == ["question: Who sang?"] * 2
    assert [sample.target for sample in read_samples(path, "squad_qa")] == ["Ann"] * 2


def test_splits_of_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_splits(str(tmp_path / "nowhere"), ["train"])
    with pytest.raises(ConfigError, match=r"no train\.json or train\.jsonl"):
        find_splits(str(tmp_path), ["train"])
    train = write(tmp_path / "train.jsonl", [{"src": "a", "tgt": "b"}])
    assert find_splits(str(tmp_path), ["train"]) == {"train": train}
    with pytest.raises(ConfigError, match=r"no dev\.json or dev\.jsonl"):
        find_splits(str(tmp_path), ["train", "dev"])
    assert find_splits(str(train), ["train", "dev"]) == {"train": train, "dev": train}
    validation = write(tmp_path / "validation.jsonl", [{"src": "c", "tgt": "d"}])
    assert find_splits(str(tmp_path), ["dev"]) == {"dev": validation}
    assert find_splits(str(train), ["train", "dev"]) == {"train": train, "dev": validation}
    assert find_splits(str(train), ["dev"]) == {"dev": train}, "evaluate FILE means that file"
    dev = write(tmp_path / "dev.json", [{"src": "e", "tgt": "f"}])
    assert find_splits(str(tmp_path), ["train", "dev"]) == {"train": train, "dev": dev}
    both = load_samples(str(tmp_path), None, None, ["train", "dev"])
    assert [both[split][0].prompt for split in ("train", "dev")] == ["a", "e"]


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="squad or squad_qa"):
        load_samples(str(tmp_path), None, "sqaud", ["train"])
    with pytest.raises(ConfigError, match="squad or squad_qa"):
        load_samples(None, None, "sqaud", ["train"])


def test_predict_reads_what_evaluate_reads(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    answers = [{"text": "Ann", "answer_start": 0}]
    question = {"id": "1", "question": "Who sang?", "answers": answers}
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "Ann sang.", "qas": [question]}]}]}))
    for task in (None, "squad", "squad_qa"):
        for given in (path, tmp_path):
            assert read_prompts(str(given), task) == read_samples(path, task)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"context": "Ann sang.", "question": "Who sang?"}) + "\n")
    (asked,) = read_prompts(str(rows), "squad_qa")
    assert asked.prompt == read_samples(path, "squad_qa")[0].prompt
    with pytest.raises(ConfigError, match="--task_name sqad is not known"):
        read_prompts(str(rows), "sqad")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--data_file .*empty: the folder has no dev\.json"):
        read_prompts(str(tmp_path / "empty"))
