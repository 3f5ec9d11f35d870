"""Alpaca, ShareGPT, tool calls, prompts and completions, SQuAD v2, tables: rows as samples, wrong ones by their place."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arriero.config.data import DATA_FORMATS, DataOptions, DataPart, dataset_parts
from arriero.config.row_lengths import RowLengths
from arriero.data import row_files
from arriero.data.pairs import read_pairs
from arriero.data.prompt_tokens import encode_prompt
from arriero.data.row_files import read_csv, read_json, read_rows
from arriero.data.rows.formats import FORMATS, sample_from_row
from arriero.data.rows.preferences import pair_from_row
from arriero.data.samples import Sample
from arriero.data.sft import encode_all, encode_sample
from arriero.data.sources import find_splits, load_samples, read_samples, rows_by_source
from arriero.data.squad import NO_ANSWER, exact_match, f1_score
from arriero.data.template_rows import check_generation_prompt
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import ConfigError, DataError
from arriero.formats.download import resolve_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(
        resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)
    )


class WithoutTemplate:
    """A tokenizer as that of a base model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def has_chat_template(self) -> bool:
        return False


def test_options_and_readers_name_the_same_formats() -> None:
    assert ("auto", *FORMATS) == DATA_FORMATS


# Instructions.

SEED = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "x", "output": "y"}]}


def test_the_first_instance_of_a_seed_task() -> None:
    flat = {"instruction": "Add.", "input": "1 2", "output": "3"}
    for name in ("auto", "instruction", "alpaca"):
        ours, other = (sample_from_row(row, "f:1", data_format=name) for row in (SEED, flat))
        assert ours == other
    assert (ours.prompt, ours.target) == ("Add.\n\n1 2", "3")


def test_alpaca_is_a_turn_of_a_chat_or_alpacas_own_words(tokenizer: Tokenizer) -> None:
    sample = sample_from_row(
        {"instruction": "Add {instruction}.", "input": "1 2", "output": "3"}, "f:1", data_format="alpaca"
    )
    chat = tokenizer.decode(encode_prompt(sample, tokenizer))
    assert "Add {instruction}.\n\n1 2" in chat
    assert "###" not in chat
    base = WithoutTemplate(tokenizer)
    # the published prompt (train.py of tatsu-lab/stanford_alpaca)
    published = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {instruction}.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert tokenizer.decode(encode_prompt(sample, base)) == published  # type: ignore[arg-type]
    without = sample_from_row({"instruction": "Sing.", "input": "", "output": "la"}, "f:1", data_format="alpaca")
    published = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSing.\n\n### Response:"
    )
    assert tokenizer.decode(encode_prompt(without, base)) == published  # type: ignore[arg-type]


def test_text_is_learned_from_its_first_word(tokenizer: Tokenizer) -> None:
    example, _, cut = encode_sample(sample_from_row({"text": "once upon a time"}, "f:1"), tokenizer, RowLengths(8, 4))
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == "<s>once upon a time</s>"
    assert example.label_count == example.length - 1, "every token but the first, which nothing predicts"
    long, _, cut = encode_sample(sample_from_row({"text": "word " * 50}, "f:1"), tokenizer, RowLengths(8, 4))
    assert cut
    assert long.length == 8 + 4, "both lengths are its own"


def test_prompt_and_completion_as_texts_and_as_turns() -> None:
    plain = sample_from_row({"prompt": "2+2=", "completion": "4"}, "f:1")
    assert (plain.prompt, plain.target, plain.chat) == ("2+2=", "4", False)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert sample_from_row({"prompt": turns[:1], "completion": turns[1:]}, "f:1") == sample_from_row(
        {"messages": turns}, "f:1"
    )


# Conversations.


def test_sharegpt_equals_messages() -> None:
    row = {
        "system": "Be kind.",
        "tools": json.dumps([{"name": "clock"}]),
        "conversations": [
            {"from": "human", "value": "When?"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon."},
        ],
    }
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    same = {
        "tools": [{"name": "clock"}],
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": [{"type": "text", "text": "12:"}, {"type": "text", "text": "00"}]},
            {"role": "assistant", "content": "Noon."},
        ],
    }
    sample = sample_from_row(row, "f:1")
    assert sample == sample_from_row(same, "f:1")
    assert (sample.turn, sample.prompt, sample.target, sample.where) == ({"role": "tool"}, "12:00", "Noon.", "f:1")
    assert sample.history[2]["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert sample.tools == ({"name": "clock"},)


def test_tool_calls_need_a_template(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    with pytest.raises(DataError, match=r"^f:1 has tool calls"):
        encode_sample(sample_from_row({"messages": turns}, "f:1"), WithoutTemplate(tokenizer), RowLengths(64, 64))  # type: ignore[arg-type]


USER = {"role": "user", "content": "q"}
WRONG: list[tuple[str, Any, str]] = [
    (
        "auto",
        {"messages": [{"role": "critic", "content": "x"}]},
        r"messages\[0\]: unknown role 'critic': one of system",
    ),
    ("auto", {"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\]: unknown role 'alien'"),
    ("auto", {"conversations": [{"from": "human"}]}, r"conversations\[0\] needs the strings 'from' and 'value'"),
    ("auto", {"conversations": []}, "'conversations' must be a list of turns"),
    ("auto", {"conversations": [{"from": "human", "value": "x"}]}, "the last turn must be the assistant's"),
    ("auto", {"conversations": [{"from": "function_call", "value": "x"}]}, "'value' of a function_call is not JSON"),
    ("auto", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the model reads text only"),
    ("auto", {"messages": [{**USER, "tool_calls": [{}]}]}, "only the assistant makes 'tool_calls'"),
    ("auto", {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, r"tool_calls\[0\] needs a function"),
    (
        "auto",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "["}]}]},
        "'arguments' is not JSON",
    ),
    (
        "auto",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "'arguments' must be a JSON object",
    ),
    ("auto", {"messages": [USER, {"role": "assistant", "content": "x"}], "tools": {"a": 1}}, "'tools' must be a list"),
    ("auto", {"instruction": "x", "instances": []}, "'instances' must be a list of objects"),
    ("auto", {"instruction": "x", "instances": [{"input": ""}]}, "has no 'output'"),
    ("auto", {"prompt": "x"}, "has no 'completion'"),
    ("auto", {"prompt": [USER], "completion": "x"}, "'completion' must be a list of turns"),
    ("auto", {"text": None}, "has no 'text'"),
    ("auto", {"messages": None, "text": None}, "'messages' must be a list of turns"),
    ("auto", {"prompt": "x", "chosen": "a", "rejected": None}, "a pair of answers"),
    ("alpaca", {"src": "a", "tgt": "b"}, "none of the keys instruction: found src, tgt"),
    ("sharegpt", {"messages": []}, "none of the keys conversations: found messages"),
]


@pytest.mark.parametrize(("data_format", "row", "message"), WRONG)
def test_a_wrong_row_is_named_with_its_line(data_format: str, row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_samples(path, None, data_format)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["auto", "prompt"])
def test_null_columns_are_of_other_rows(name: str) -> None:
    nulls = dict.fromkeys(
        ("messages", "conversations", "context", "instruction", "src", "text", "chosen", "rejected", "sort", "label")
    )
    sample = sample_from_row({**nulls, "prompt": "a", "completion": "b"}, "x:1", data_format=name)
    assert (sample.prompt, sample.target) == ("a", "b")


def test_null_columns_within_a_format() -> None:
    other = {"answers": None, "question": None, "instances": None, "input": None}
    dolly = {"instruction": "a", "context": "b", "response": "c", **other}
    assert sample_from_row(dolly, "x:1").prompt == "a\nb"
    assert sample_from_row({"instruction": "a", "context": None, "output": "c"}, "x:1").prompt == "a"
    asked = sample_from_row({"context": "a", "answers": None, "answer": "b", "question": "c"}, "x:1")
    assert asked.prompt == "answer: b context: a"
    said = [{"role": role, "content": role, "from": None, "value": None} for role in ("user", "assistant")]
    assert sample_from_row({"conversations": said}, "x:1").target == "assistant"
    pair = pair_from_row({"prompt": "a", "chosen": "b", "rejected": "c", "response": None, "sort": None}, "x:1")
    assert (pair.chosen.target, pair.rejected.target) == ("b", "c")


# Templates and answers.


class Rendered:
    """A tokenizer of which only the template is asked."""

    def __init__(self, template: str) -> None:
        from arriero.data.chat_template import ChatTemplate

        self._template = ChatTemplate(template)

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        return self._template.render(messages, named={}, add_generation_prompt=add_generation_prompt)


TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"no generation prompt: it writes '<\|assistant\|>' before an answer"):
        check_generation_prompt(Rendered(TURN))  # type: ignore[arg-type]
    fine = [
        TURN + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        # Mistral: the user's turn ends where the answer begins
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        "{{ raise_exception('a system message first') }}",
    ]
    for template in fine:
        check_generation_prompt(Rendered(template))  # type: ignore[arg-type]


def test_empty_and_long_answers_are_counted(tokenizer: Tokenizer) -> None:
    rows = [{"src": "a", "tgt": " "}, {"src": "a", "tgt": "b " * 40}, {"src": "a", "tgt": "b"}]
    samples = [sample_from_row(row, f"f:{i}") for i, row in enumerate(rows)]
    examples, report = encode_all(samples, tokenizer, RowLengths(32, 8))
    assert (report.empty_target, report.truncated_target, report.rows) == (1, 1, 3)
    assert examples[1].label_count == 8
    assert "1 answers cut to fit tgt_length; warning: 1 rows have an empty answer" in str(report)


def test_a_prompt_that_cannot_fit_is_named_with_its_line(tokenizer: Tokenizer) -> None:
    row = {"context": "c", "answers": "answer " * 30, "question": "q"}
    with pytest.raises(DataError, match=r"^f:7 needs \d+ prompt tokens"):
        encode_all([sample_from_row(row, "f:7")], tokenizer, RowLengths(8, 8))


# SQuAD v2.


def squad_v2(path: Path) -> Path:
    qas = [
        {"id": "a", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False},
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "Ann"}]},
    ]
    document = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "Ann sang.", "qas": qas}]}]}
    path.write_text(json.dumps(document))
    return path


def test_squad_v2_learns_to_say_that_there_is_no_answer(tmp_path: Path) -> None:
    path = squad_v2(tmp_path / "dev.json")
    answered, unanswerable = read_samples(path, "squad_qa")
    assert (answered.target, answered.references) == ("Ann", ("Ann",))
    assert (unanswerable.target, unanswerable.references) == (NO_ANSWER, ("",))
    assert [sample.id for sample in read_samples(path, "squad")] == ["a"], "no question can be made of no answer"
    # as the Hub's squad_v2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}))
    assert read_samples(rows, "squad_qa")[0].target == NO_ANSWER


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("", ("",), 1.0),
        ("Unanswerable.", ("",), 1.0),
        ("the", ("",), 1.0),  # empty after normalisation, as evaluate-v2.0.py compares it
        ("Ann", ("",), 0.0),
        ("unanswerable", ("Ann",), 0.0),
        ("", ("Ann",), 0.0),
    ],
)
def test_no_answer_counts_as_in_the_official_script(prediction: str, references: tuple[str, ...], score: float) -> None:
    assert exact_match(prediction, references) == f1_score(prediction, references) == score


# Tables.


def test_csv_and_tsv_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes('\ufeffinstruction,input,output\r\n"Say ""hi"", twice",,"hi\nhi"\r\n\r\nSum,"1,2",3\r\n'.encode())
    first, second = read_samples(path, None)
    assert (first.prompt, first.target, first.where) == ('Say "hi", twice', "hi\nhi", f"{path}:3")
    assert (second.prompt, second.target) == ("Sum\n1,2", "3")
    indexed = tmp_path / "pandas.csv"
    indexed.write_text(",prompt,completion\n0,a,b\n1,c,\n")
    assert [row for _, row in read_rows(indexed)] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": ""},
    ]
    table = tmp_path / "dev.tsv"
    table.write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n'
    )
    assert read_samples(table, None)[0].target == "b"
    assert find_splits(str(tmp_path), ["train", "dev"]) == {"train": path, "dev": table}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"src,tgt\na,b\na\n", r":3: 1 fields, the header names 2"),
        (b"src,tgt\na,b,c\n", r":2: 3 fields, the header names 2"),
        (b"src,src\na,b\n", r":1: the first line must name every column"),
        (b"src,\na,b\n", r":1: the first line must name every column"),
        (b",src,\n0,a,b\n", r":1: the first line must name every column"),
        (b'""\n0\n', r":1: the first line must name every column"),
        (b"src,tgt\na,\xff\n", r"train.csv: line 2 byte 3 of it is no UTF-8 text; save the file as UTF-8"),
        (b'src,tgt\na,"b" c\n', r":2: not readable as a table"),
        (b"src,tgt\n", r"holds no row"),
        (b"", r"holds no row"),
    ],
)
def test_a_wrong_table_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_samples(path, None)
    assert str(error.value).startswith(str(path))


def test_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 100)
    table, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text(f"src,tgt\na,{'b' * 101}\n")
    lines.write_text(json.dumps({"src": "a", "tgt": "b" * 101}) + "\n")
    with pytest.raises(DataError, match=r"t\.csv:2: a line of more than 100 characters"):
        list(read_csv(table))
    with pytest.raises(DataError, match="a row of more than 100 bytes"):
        list(read_json(lines))


# JSON arrays.


ALPACA = [
    {"instruction": "Sum", "input": "1, 2", "output": "3"},
    {"instruction": "Hi", "input": "", "output": "Hé [1]"},
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("indent", [None, 4], ids=["one line", "indented"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\r\n \n"], ids=["plain", "byte order mark", "blank lines"])
@pytest.mark.parametrize("data_format", ["auto", "alpaca"])
def test_an_array_of_rows(name: str, indent: int | None, start: str, data_format: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(start + json.dumps(ALPACA, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}[0]", ALPACA[0]), (f"{path}[1]", ALPACA[1])]
    samples = read_samples(path, None, data_format)
    assert [sample.target for sample in samples] == ["3", "Hé [1]"]
    assert samples[1].where == f"{path}[1]"


def test_an_array_of_pairs_and_halves_of_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('[{"prompt": "a", "chosen": "\\ud83d", "rejected": "\\ud83d\\ude00"}]\n')
    assert list(read_rows(path)) == [(f"{path}[0]", {"prompt": "a", "chosen": "\ufffd", "rejected": "\U0001f600"})]
    (pair,) = read_pairs(path)
    assert (pair.chosen.target, pair.rejected.target) == ("\ufffd", "\U0001f600")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"src": "a", "tgt": "b"}, 3]', r"\[1\]: a JSON object is expected, found a number"),
        (b'[{"src": "a", "tgt": "b"}, {"src": "a"}]', r"\[1\]: has no 'tgt'"),
        (b'[{"src": "a", "tgt": "b"},]', r"\[1\]: not JSON \(Expecting value: line 1 column 27"),
        (b'[{"src": "a", "tgt": "b"},\n {"src": a}]', r"\[1\]: not JSON \(Expecting value: line 2 column 10"),
        (b'\n[{"src": "a", "tgt": "b"}\n', r"\[0\]: not followed by , or \] \(line 3 column 1\)"),
        (b'[{"src": "a", "tgt": "b"} {"src"', r"\[0\]: not followed by , or \] \(line 1 column 27\)"),
        (b'[{"src": "a", "tgt": "b"}]\n[]', r": more follows the array's end \(line 2 column 1\)"),
        (b'[{"src": "a"},\n {"src": "\xff"}]', r": line 2 byte 11 of it is no UTF-8 text; save the file as UTF-8"),
        (b"[" * 100_000, r"\[0\]: not JSON"),
        (b"[", r"\[0\]: not JSON"),
        (b"[ ]", r": holds no row to learn from"),
    ],
)
def test_a_wrong_array_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_samples(path, None)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_arrays_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"src": "a", "tgt": "b" * 101}]))
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 100)
    with pytest.raises(DataError, match=r"t\.json\[0\]: a row of more than 100 characters"):
        list(read_rows(path))
    monkeypatch.setattr(row_files, "MAX_ARRAY_BYTES", 120)
    with pytest.raises(DataError, match=r"a JSON array of more than 120 bytes.*\(JSON lines\)"):
        list(read_rows(path))


def test_one_object_over_several_lines_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"src": "a", "tgt": "b"}, indent=1))
    for data_format in ("auto", "src"):
        with pytest.raises(DataError, match="rows are JSON objects, one a line, or one JSON array"):
            read_samples(path, None, data_format)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_rows_from_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    os.mkfifo(path)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(path.write_text, json.dumps(ALPACA))
        assert [row for _, row in read_rows(path)] == ALPACA
        writing.result()


# Parquet.


def test_parquet_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "train.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"messages": turns}] * 600), path)
    samples = read_samples(path, None)
    assert len(samples) == 600
    assert (samples[-1].prompt, samples[-1].target, samples[-1].where) == ("a", "b", f"{path} row 599")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_rows(path))


# Several data sets.


def test_parts_of_a_data_set(tmp_path: Path) -> None:
    assert dataset_parts("a.jsonl:0.7, b.jsonl:0.3") == [DataPart("a.jsonl", 0.7), DataPart("b.jsonl", 0.3)]
    assert dataset_parts("a.jsonl,b") == [DataPart("a.jsonl"), DataPart("b")]
    assert dataset_parts("a,b", [2, 1]) == [DataPart("a", 2), DataPart("b", 1)]
    odd = tmp_path / "a,b:1"
    odd.write_text("")
    assert dataset_parts(str(odd)) == [DataPart(str(odd))], "a file of that name is that file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_path": "a:1,b"}, "b has no weight and others have"),
        ({"dataset_path": "a:1,b:0"}, "a number above 0, found 1, 0"),
        ({"dataset_path": "a:nan,b:1"}, "a number above 0"),
        ({"dataset_path": "a,a"}, "names a file twice"),
        ({"dataset_path": ","}, "names no file"),
        ({"dataset_path": "a:1,b:1", "dataset_weights": [1.0, 1.0]}, "say the same"),
        ({"dataset_path": "a,b", "dataset_weights": [1.0]}, "has 1 numbers and --dataset_path names 2"),
        ({"dataset_weights": [1.0]}, "needs --dataset_path"),
        ({"packing": False, "max_tokens_per_batch": 100}, "drop one of them"),
        ({"task_name": "squad_qa", "data_format": "alpaca"}, "drop the second"),
        ({"data_format": "csv"}, "choose one of auto"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataOptions(**options)


def test_rows_of_several_files_know_their_source(tmp_path: Path) -> None:
    for name, count in (("a.jsonl", 3), ("b.jsonl", 2)):
        (tmp_path / name).write_text(
            "".join(json.dumps({"src": f"{name}{i}", "tgt": "x"}) + "\n" for i in range(count))
        )
    path = f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:0.5"
    samples = load_samples(path, None, None, ["train"])["train"]
    assert [(s.prompt, s.source) for s in samples] == [
        ("a.jsonl0", 0), ("a.jsonl1", 0), ("a.jsonl2", 0), ("b.jsonl0", 1), ("b.jsonl1", 1),
    ]  # fmt: skip
    assert rows_by_source(samples) == [3, 2]
    first = load_samples(path, None, None, ["train"], limits={"train": 1})["train"]
    assert [sample.prompt for sample in first] == ["a.jsonl0", "b.jsonl0"], "the first rows of each"
    assert isinstance(first[0], Sample)
