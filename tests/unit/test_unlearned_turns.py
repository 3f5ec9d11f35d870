"""Assistant turns of `weight` 0 (OpenAI) or `train` false (axolotl): in the row as they were, and never learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from learned_runs import learned_runs

from arriero.config.row_lengths import RowLengths
from arriero.data.batch import pack
from arriero.data.preview import render
from arriero.data.rows.formats import sample_from_row
from arriero.data.sft import IGNORE, Example, encode_all, encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import DataError
from arriero.formats.download import resolve_model

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant:{% generation %} {{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Earlier answers are shortened, and a conversation ends otherwise than a turn
UNSTABLE = MARKED.replace("{{ m.content }}{{ eos_token }}", "{{ m.content[:40 // loop.revindex] }}{{ eos_token }}")
TEXTS = ["First answer", "Second answer", "Third answer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)


def with_template(folder: Path, template: str | None, target: Path) -> Tokenizer:
    shutil.copytree(folder, target)
    if template is not None:
        config = json.loads((target / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(target)


def row(*skipped: int, mark: dict[str, Any] | None = None) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}]
    for number, text in enumerate(TEXTS):
        turns.append({"role": "user", "content": f"Question {number}"})
        more = (mark or {"weight": 0}) if number in skipped else {}
        turns.append({"role": "assistant", "content": text, **more})
    return {"messages": turns}


def learned(example: Example, tokenizer: Tokenizer) -> list[str]:
    return [text.strip() for text in learned_runs(example, tokenizer)]


@pytest.mark.parametrize("template", [None, MARKED], ids=["found", "marked"])
@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 1), (2,), (0, 2), (1, 2)])
def test_unlearned_turns_are_context(
    template: str | None, skipped: tuple[int, ...], folder: Path, tmp_path: Path
) -> None:
    tokenizer = with_template(folder, template, tmp_path / "model")
    assert tokenizer.marks_generation == (template is not None)
    plain, *_ = encode_sample(sample_from_row(row(), "f:1"), tokenizer, RowLengths(512, 64))
    for mark in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": None}):
        example, *_ = encode_sample(sample_from_row(row(*skipped, mark=mark), "f:1"), tokenizer, RowLengths(512, 64))
        assert example.input_ids == plain.input_ids, "the model sees the same row"
        wanted = [text + "</s>" for number, text in enumerate(TEXTS) if number not in skipped]
        assert learned(example, tokenizer) == wanted
        last, *_ = encode_sample(
            sample_from_row(row(*skipped, mark=mark), "f:1"), tokenizer, RowLengths(512, 64), train_on="last"
        )
        assert learned(last, tokenizer) == [text for text in wanted if text.startswith("Third")]


def test_weight_1_and_train_true_change_nothing(folder: Path) -> None:
    for mark in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert sample_from_row(row(0, 1, 2, mark=mark), "f:1") == sample_from_row(row(), "f:1")


def test_sharegpt_marks_its_turns_alike() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    for mark in ({"weight": 0}, {"train": False}):
        items = [
            {"from": names[turn["role"]], "value": turn["content"], **(mark if turn["content"] == TEXTS[1] else {})}
            for turn in row()["messages"]
        ]
        assert sample_from_row({"conversations": items}, "f:1") == sample_from_row(row(1, mark=mark), "f:1")


def test_without_a_chat_template_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(tokenizer, "has_chat_template", lambda: False)
    question, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Third answer"}
    turns = [[question, answer], [question, {**answer, "weight": 0}]]
    samples = [sample_from_row({"messages": messages}, "f:1") for messages in turns]
    (plain, skipped), report = encode_all(samples, tokenizer, RowLengths(512, 64))
    assert skipped.input_ids == plain.input_ids
    assert (learned(plain, tokenizer), learned(skipped, tokenizer)) == (["Third answer</s>"], [])
    assert "; warning: 1 rows have nothing that is learned" in str(report)


def test_rows_without_anything_to_learn_are_counted_and_packed(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    samples = [sample_from_row(row(*skipped), "f:1") for skipped in ((0, 1, 2), (0, 1), (2,))]
    examples, report = encode_all(samples, tokenizer, RowLengths(512, 64))
    assert "; warning: 1 rows have nothing that is learned" in str(report)
    assert report.empty_target == 0
    assert [example.label_count > 0 for example in examples] == [False, True, True]
    # rows that begin alike hold their beginning once, up to where one of them learns
    for batch in (pack(examples), pack(examples, share_prefixes=True)):
        counted = [label for label in batch.labels.flatten().tolist() if label != IGNORE]
        assert sorted(counted) == sorted(label for example in examples for label in example.labels if label != IGNORE)
        assert batch.label_tokens == len(counted)
    with pytest.raises(DataError, match="every label is masked"):
        encode_all(samples[:1], tokenizer, RowLengths(512, 64))


def test_the_preview_shows_them_unlearned(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    example, *_ = encode_sample(sample_from_row(row(1), "f:1"), tokenizer, RowLengths(512, 64))
    shown = render(example, tokenizer, color=False)
    assert "[[ First answer</s>]]" in shown
    assert " Second answer</s>" in shown
    assert "[[ Second" not in shown
    assert "[[ Third answer</s>]]" in shown


def test_no_template_gets_the_mark_and_no_prediction_has_it(folder: Path, tmp_path: Path) -> None:
    shows = MARKED.replace("{{ m.content }}", "{{ m.content }}{{ m.train }}{{ m.weight }}")
    tokenizer = with_template(folder, shows, tmp_path / "model")
    example, *_ = encode_sample(sample_from_row(row(0, 2), "f:1"), tokenizer, RowLengths(512, 64))
    assert "False" not in tokenizer.decode(example.input_ids)
    turns = row(0, 1)["messages"][:-1]
    asked = sample_from_row({"messages": turns}, "f:1", needs_target=False)
    assert all(set(turn) == {"role", "content"} for turn in asked.history)


def test_a_template_whose_turns_cannot_be_told_apart_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(folder, UNSTABLE, tmp_path / "model")
    sample = sample_from_row(row(0), "f:9")
    with pytest.raises(DataError, match=r"^f:9: the chat template writes an earlier turn otherwise.*--train_on last"):
        encode_sample(sample, tokenizer, RowLengths(512, 64))
    assert learned(encode_sample(sample, tokenizer, RowLengths(512, 64), train_on="last")[0], tokenizer)
