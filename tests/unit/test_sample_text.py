"""Answers as they are written, and rows that a model's template, or text without one, would lose a part of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.config.row_lengths import RowLengths
from arriero.data.pairs import encode_pairs
from arriero.data.preview import render
from arriero.data.prompt_tokens import encode_prompt
from arriero.data.rows.formats import sample_from_row
from arriero.data.rows.preferences import pair_from_row
from arriero.data.sample_text import told_answer
from arriero.data.sft import encode_all, encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import DataError
from arriero.formats.download import resolve_model

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "w", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}
TURNS = "{% for m in messages %}{{ m.role }}\n{{ m.content }}CALLS</s>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}assistant\n{% endif %}"
PLAIN = TURNS.replace("CALLS", "")
WRITING = "{{ tools | tojson if tools }}" + TURNS.replace("CALLS", "{{ m.tool_calls | tojson if m.tool_calls }}")

Make = Callable[[str | None], Tokenizer]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tokenizer with a chat template, or with none."""
    source = resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)

    def made(template: str | None) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer") / "model"
        shutil.copytree(source, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return load_tokenizer(folder)

    return made


def shown(row: dict[str, Any], tokenizer: Tokenizer, data_format: str = "auto") -> str:
    """The row's text, what is learned of it in [[ ]]."""
    sample = sample_from_row(row, "f:1", data_format=data_format)
    return render(encode_sample(sample, tokenizer, RowLengths(512, 64))[0], tokenizer, color=False)


@pytest.mark.parametrize("content", ["", "x"])
def test_the_end_of_an_answer_is_learned_once(content: str, make: Make) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": content}]}
    assert shown(row, make(PLAIN)) == f"user\nhi</s>\nassistant\n[[{content}</s>]]"


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("def add(a, b):\n", "    return a + b\n", "def add(a, b):\n[[    return a + b\n</s>]]"),
        ("for i in x:\n", "    print(i)\n    print(2)", "for i in x:\n[[    print(i)\n    print(2)</s>]]"),
        ("2+2= ", "4", "2+2= [[4</s>]]"),
        ("2+2=", "4 ", "2+2=[[ 4 </s>]]"),
        ("2+2=", " 4", "2+2=[[ 4</s>]]"),
        ("2+2=", "\n4", "2+2=[[\n4</s>]]"),
        ("2+2=", "", "2+2=[[</s>]]"),
    ],
)
@pytest.mark.parametrize("named", ["auto", "prompt"])
def test_completions_are_learned_as_written(prompt: str, completion: str, text: str, named: str, make: Make) -> None:
    row = {"prompt": prompt, "completion": completion}
    assert shown(row, make(None), named) == f"<s>{text}"
    pair = pair_from_row({"prompt": prompt, "chosen": completion, "rejected": "other"}, "f:1")
    (encoded,), _ = encode_pairs([pair], make(None), RowLengths(512, 64))
    assert render(encoded.chosen, make(None), color=False) == f"<s>{text}"


def test_texts_and_answers_of_chats_are_learned_as_written(make: Make) -> None:
    assert shown({"text": " once\n"}, make(None)) == "<s>[[ once\n</s>]]"
    said = {"role": "assistant", "content": "    return x\n"}
    for turns in ([USER, said], [USER, said, USER, said]):
        text = shown({"messages": turns}, make(PLAIN))
        assert text.replace("[[", "").replace("]]", "").endswith("assistant\n    return x\n</s>")
        assert text.count("    return x\n</s>]]") == len(turns) // 2


def test_rows_of_paddlenlp_stay_what_they_are(make: Make) -> None:
    tokenizer = make(None)
    for row in ({"src": "a\n", "tgt": " b\n"}, {"instruction": "a\n", "output": " b\n"}):
        assert shown(row, tokenizer) == "<s>a\n[[ b</s>]]"
    row = {"context": "c", "answers": "a", "question": " q? "}
    assert shown(row, tokenizer) == "<s>answer: a context: c</s>[[question:  q?</s>]]"


def test_an_answer_goes_on_without_a_blank_of_the_vocabulary(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = tmp_path / "lines.txt"
    lines.write_text("the prompt and the answer of a row\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    row = {"prompt": "the prompt\n", "completion": "answer"}
    example, *_ = encode_sample(sample_from_row(row, "f:1"), tokenizer, RowLengths(64, 64))
    assert tokenizer.decode(example.input_ids) == "the prompt\nanswer"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2},
    ],
)
def test_several_turns_need_a_template(row: dict[str, Any], make: Make) -> None:
    with pytest.raises(DataError, match=r"^f:1 has several turns or a system message.*chat_template\.jinja.*'prompt'"):
        encode_sample(sample_from_row(row, "f:1"), make(None), RowLengths(64, 64))
    encode_sample(sample_from_row(row, "f:1"), make(PLAIN), RowLengths(64, 64))


def test_one_question_needs_none(make: Make) -> None:
    assert shown({"messages": [USER, ANSWER]}, make(None)) == "<s>hi[[ hello</s>]]"
    row = {"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]}
    assert "### Response: b" in shown(row, make(None), "alpaca")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, CALLING]},
        {"messages": [USER, CALLING], "tools": [TOOL]},
        {"messages": [USER, CALLING, {"role": "tool", "content": "1"}, ANSWER]},
        {"messages": [USER, ANSWER], "tools": [TOOL]},
    ],
)
def test_calls_that_the_template_leaves_out_are_refused(row: dict[str, Any], make: Make) -> None:
    sample = sample_from_row(row, "f:1")
    with pytest.raises(
        DataError, match=r"^f:1 has tool calls, which only .* can read: take one that has it \(such as qwen3"
    ):
        encode_sample(sample, make(PLAIN), RowLengths(64, 64))
    assert '"w"' in shown(row, make(WRITING))
    encode_prompt(sample_from_row({"messages": [USER]}, "f:1", needs_target=False), make(PLAIN))


def test_control_tokens_in_bare_text_are_told(make: Make) -> None:
    rows = [{"text": "plain"}, {"text": "user</s>"}, {"prompt": "<s>a", "completion": "b"}]
    rows += [{"src": "a", "tgt": "b</s>"}]
    samples = [sample_from_row(row, f"f:{number}") for number, row in enumerate(rows, start=1)]
    _, report = encode_all(samples, make(PLAIN), RowLengths(64, 64))
    assert str(report).endswith(
        "; warning: 3 rows spell out special tokens, such as '</s>' (f:2), which are read as text: give conversations as "
        "'messages', which the chat template writes"
    )
    chat = {"messages": [USER, {"role": "assistant", "content": "</s> ends it"}]}
    _, report = encode_all([samples[0], sample_from_row(chat, "f:9")], make(PLAIN), RowLengths(64, 64))
    assert "special tokens" not in str(report)


@pytest.mark.parametrize(
    ("row", "text", "told"),
    [
        ({"src": "Capital of Peru?", "tgt": "Lima"}, " Lima \n", "Lima"),
        ({"prompt": "Capital of Peru?", "completion": ""}, " Lima.\n", "Lima.\n"),
        ({"prompt": "Capital of Peru?", "completion": ""}, "Lima", "Lima"),
        ({"prompt": "def f():\n", "completion": ""}, "    return 1\n", "    return 1\n"),
        ({"prompt": "def f():\n", "completion": ""}, " return 1", " return 1"),
        ({"prompt": "a list:", "completion": ""}, "  indented", "  indented"),
    ],
)
def test_an_answer_is_told_without_the_space_that_parts_it_from_its_prompt(
    row: dict[str, Any], text: str, told: str
) -> None:
    assert told_answer(sample_from_row(row, "here"), text) == told


def test_a_named_format_is_read_as_the_one_that_the_keys_tell(make: Make) -> None:
    row = {"src": "Capital of Peru? ", "tgt": "  Lima "}
    told, named = (sample_from_row(row, "here", data_format=name) for name in ("auto", "src"))
    assert encode_sample(told, make(PLAIN), RowLengths(64, 64)) == encode_sample(named, make(PLAIN), RowLengths(64, 64))


def test_pairs_of_paddlenlp_with_several_turns_need_no_template(make: Make) -> None:
    row = {"src": ["hi", "who?"], "tgt": ["ho"], "response": [["me "], ["you"]], "sort": [1, 0]}
    pair = pair_from_row(row, "here")
    ids = encode_sample(pair.chosen, make(None), RowLengths(64, 64))[0].input_ids
    assert make(None).decode(ids, skip_special_tokens=True).split() == ["hi", "ho", "who?", "me"]
