"""Rows as other tools and public data sets have them: what is read of them, and what is refused and not learned wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.cli import main
from arriero.config.row_lengths import RowLengths
from arriero.data.prompt_tokens import encode_prompt
from arriero.data.row_files import read_rows
from arriero.data.rows.formats import sample_from_row
from arriero.data.sft import encode_all
from arriero.data.sources import read_samples
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import DataError
from arriero.formats.download import resolve_model

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be kind."}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(
        resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)
    )


WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(
        (
            "auto",
            {"prompt": "p", "completion": "c", key: label},
            f"'{key}' says whether the answer is good, as in rows for KTO",
        )
        for key, label in (("label", True), ("label", False), ("label", "False"), ("kto_tag", False))
    ),
    ("auto", {"messages": [USER, ANSWER], "label": False}, "which is not supported: keep the rows where it is true"),
    ("auto", {"prompt": "p", "chosen": "a", "rejected": "b"}, r"--preference dpo \(or ipo, simpo, orpo\)"),
    ("auto", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "--preference dpo"),
    ("auto", {"instruction": "p", "chosen": "a", "rejected": "b"}, "--preference dpo"),
    ("auto", {"conversations": SHAREGPT[:1], "chosen": {}, "rejected": {}}, "--preference dpo"),
    ("auto", {"src": ["p"], "tgt": ["x"], "response": ["a", "b"], "sort": [1, 0]}, "--preference dpo"),
    (
        "auto",
        {"instruction": "i", "output": "o", "history": [["a", "b"]]},
        "'history' has no place.*--data_format alpaca",
    ),
    ("auto", {"instruction": "i", "output": "o", "system": "s"}, "'system' has no place.*--data_format alpaca"),
    ("auto", {"prompt": "i", "completion": "o", "system": "s"}, "'system' has no place.*under 'messages'"),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["a"]]}, "'history' must be a list of"),
    ("alpaca", {"instruction": "i", "output": "o", "history": "a"}, "'history' must be a list of"),
    (
        "auto",
        {"system": "a", "messages": [SYSTEM, USER, ANSWER]},
        "'system' and the system turn differ: leave one of them",
    ),
    ("auto", {"system": "a", "conversations": [{"from": "system", "value": "b"}, *SHAREGPT]}, "system turn differ"),
    ("auto", {"system": 3, "messages": [USER, ANSWER]}, "'system' must be a string, found a number"),
    (
        "auto",
        {"prompt": "p", "completion": "a", "response": "b"},
        "has 'completion' and 'response', two keys for the same",
    ),
    (
        "auto",
        {"instruction": "p", "output": "a", "response": "b"},
        "has 'output' and 'response', two keys for the same",
    ),
    (
        "auto",
        {"instruction": "i", "input": "x", "context": "c", "response": "r"},
        "has 'input' and 'context', two keys",
    ),
    ("auto", {"instruction": "i", "context": "c", "question": "q"}, "has no 'answers'"),
    ("alpaca", {"data": [{"instruction": "i", "output": "o"}]}, "if 'data' holds your rows, write its list alone"),
    *(
        (
            "auto",
            {"messages": [USER, {**ANSWER, "weight": weight}]},
            r"messages\[1\]: 'weight' must be 0 .* or 1, found",
        )
        for weight in (2, 0.5, "0", True, -1)
    ),
    ("auto", {"messages": [USER, {**ANSWER, "train": 0}]}, r"messages\[1\]: 'train' must be true or false, found 0"),
]


@pytest.mark.parametrize(("data_format", "row", "message"), WRONG)
def test_what_would_be_learned_wrongly_is_refused(
    data_format: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message) as error:
        read_samples(path, None, data_format)
    assert str(error.value).startswith(f"{path}:1: ")
    assert "\n" not in str(error.value)


def test_what_has_an_answer_beside_a_pair_or_a_label_is_read() -> None:
    pair = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    assert sample_from_row({"messages": [USER, ANSWER], **pair}, "f:1").target == "a", "as UltraFeedback's rows"
    for label in (1, "positive", None):
        assert sample_from_row({"src": "s", "tgt": "t", "label": label}, "f:1").target == "t"
    assert sample_from_row({"text": "t", "label": True}, "f:1").target == "t", "no answer that is judged"
    judged = {"prompt": "p", "label": False}
    assert sample_from_row(judged, "f:1", needs_target=False).prompt == "p", "nothing is learned"


# Dolly, and the names of the answer.


@pytest.mark.parametrize("data_format", ["auto", "instruction", "alpaca"])
def test_dollys_rows_are_instructions(data_format: str) -> None:
    dolly = {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "closed_qa"}
    same = {"instruction": "Who?", "input": "Ann sang.", "output": "Ann"}
    ours, other = (sample_from_row(row, "f:1", data_format=data_format) for row in (dolly, same))
    assert ours == other
    assert sample_from_row({**dolly, "context": ""}, "f:1").prompt == "Who?"
    asked = sample_from_row({"instruction": "Who?", "context": "Ann sang."}, "f:1", needs_target=False)
    assert asked.prompt == "Who?\nAnn sang."


def test_an_answer_may_be_called_response() -> None:
    for key, answer in (("prompt", "completion"), ("instruction", "output")):
        assert sample_from_row({key: "p", "response": "r"}, "f:1") == sample_from_row({key: "p", answer: "r"}, "f:1")
    assert sample_from_row({"prompt": [USER], "response": [ANSWER]}, "f:1") == sample_from_row(
        {"messages": [USER, ANSWER]}, "f:1"
    )


# System messages and earlier turns.


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"conversations": SHAREGPT},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]},
    ],
)
def test_a_system_beside_the_turns_goes_before_them(row: dict[str, Any]) -> None:
    whole = sample_from_row({"messages": [SYSTEM, USER, ANSWER]}, "f:1")
    assert sample_from_row({**row, "system": "Be kind."}, "f:1") == whole
    assert sample_from_row({**row, "system": None}, "f:1").prompt == "q"


def test_a_developer_is_the_system() -> None:
    developer = {"role": "developer", "content": "Be kind."}
    assert sample_from_row({"messages": [developer, USER, ANSWER]}, "f:1").history == (SYSTEM,)


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind.", "history": [["Hi", "Hello"]]}


def test_alpaca_rows_with_history_are_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns += [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    path = tmp_path / "t.csv"
    path.write_text('instruction,input,output,system,history\nAdd.,1 2,3,Be kind.,"[[""Hi"", ""Hello""]]"\n')
    (table,) = (row for _, row in read_rows(path))
    samples = [sample_from_row(row, "f:1", data_format="alpaca") for row in (ALPACA, table)]
    samples.append(sample_from_row({"messages": turns}, "f:1"))
    alpaca, from_table, messages = encode_all(samples, tokenizer, RowLengths(512, 64))[0]
    assert alpaca == from_table == messages


def test_alpaca_rows_with_history_in_alpacas_words(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "has_chat_template", lambda: False)
    # LLaMA-Factory's template `alpaca`: the system message stands in the place of "Below is ..."
    expected = "Be kind.\n\n### Instruction:\nHi\n\n### Response: Hello"
    expected += "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    sample = sample_from_row(ALPACA, "f:1", data_format="alpaca")
    assert tokenizer.decode(encode_prompt(sample, tokenizer)) == expected
    plain = sample_from_row({**ALPACA, "system": "", "history": []}, "f:1", data_format="alpaca")
    assert tokenizer.decode(encode_prompt(plain, tokenizer)).startswith(
        "Below is an instruction that describes a task, paired"
    )


# What the report tells.


def test_several_formats_and_empty_answers_are_told(tokenizer: Tokenizer) -> None:
    rows = [
        {"src": "a", "tgt": "b"},
        *[{"messages": [USER, ANSWER]}] * 2,
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        {"src": "", "tgt": ""},
    ]
    report = str(encode_all([sample_from_row(row, "f:1") for row in rows], tokenizer, RowLengths(64, 8))[1])
    assert "; rows by format: 3 messages, 2 src" in report
    assert "; warning: 2 rows have an empty answer" in report
    one = str(encode_all([sample_from_row(row, "f:1") for row in rows[:1]], tokenizer, RowLengths(64, 8))[1])
    assert "format" not in one
    assert "warning" not in one


def test_bare_text_is_counted_where_the_keys_alone_decide(tokenizer: Tokenizer) -> None:
    row = {"instruction": "i", "output": "o"}
    quiet = [
        sample_from_row(row, "f:1", data_format="instruction"),
        sample_from_row(row, "f:1", data_format="alpaca"),
        sample_from_row({"prompt": [USER], "completion": [ANSWER]}, "f:1"),
        sample_from_row({"context": "c", "answers": "a", "question": "q"}, "f:1"),
        sample_from_row({"text": "t"}, "f:1"),
    ]
    assert encode_all(quiet, tokenizer, RowLengths(64, 8))[1].bare == 0
    bare = [sample_from_row(row, "f:1"), sample_from_row({"prompt": "p", "completion": "c"}, "f:2")]
    report = encode_all([*quiet, *bare], tokenizer, RowLengths(64, 8))[1]
    assert report.bare == 2
    assert report.hint.startswith("2 rows are bare text, while chat and serve ask through the model's chat template")


def test_bare_text_for_a_model_that_chats_is_told_once_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resolve_model("__internal_testing__/tiny-random-llama", tmp_path / "home", lambda _: None)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 4)
    start = ["finetune", "--model_name_or_path", str(model), "--dataset_path", str(tmp_path), "--output_dir"]
    start += [str(tmp_path / "run"), "--max_steps", "1", "--do_eval", "--device", "cpu"]
    assert main(start) == 0
    assert capsys.readouterr().out.count("rows are bare text, while chat and serve ask") == 1


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_bytes_that_are_no_utf8_are_named(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(mark + b'{"src": "a"}\n\n{"s\xff": 1}\n')
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert str(error.value) == f"{path}: line 3 byte 4 of it is no UTF-8 text; save the file as UTF-8"
    path = tmp_path / "t.json"
    path.write_bytes(b'{"version": "1", "data": [\n"\xe9"]}')
    with pytest.raises(DataError, match=r"t\.json: line 2 byte 2 of it is no UTF-8 text"):
        read_samples(path, None)
