"""What prompts and answers have of a row that is bounded as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.config.row_lengths import RowLengths
from arriero.data.pairs import PairSample, encode_pairs
from arriero.data.rows.formats import sample_from_row
from arriero.data.rows.preferences import pair_from_row
from arriero.data.samples import Sample
from arriero.data.sft import IGNORE, encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.formats.download import resolve_model

ROOM = RowLengths(120, 120, 120)
WHOLE = RowLengths(10_000, 10_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(
        resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)
    )


def words(count: int) -> str:
    return " ".join(f"word{i}" for i in range(count))


def bare(prompt: int, answer: int) -> Sample:
    return Sample("Read: ", words(prompt), "\nThe first?", words(answer))


def chat(prompt: int, answer: int) -> Sample:
    turns = [{"role": "user", "content": words(prompt)}, {"role": "assistant", "content": words(answer)}]
    return sample_from_row({"messages": turns}, "f:1")


def sizes(sample: Sample, tokenizer: Tokenizer, lengths: RowLengths) -> tuple[int, int, bool, bool]:
    """Tokens of the prompt and of the answer, and whether each was cut."""
    example, *cut = encode_sample(sample, tokenizer, lengths)
    learned = sum(label != IGNORE for label in example.labels)
    return len(example.input_ids) - learned, learned, *cut


@pytest.mark.parametrize("make", [bare, chat])
@pytest.mark.parametrize(
    ("prompt", "answer"), [(3, 3), (3, 15), (15, 3), (3, 60), (60, 3), (60, 15), (15, 60), (60, 60)]
)
def test_either_has_what_the_other_leaves(make: Any, prompt: int, answer: int, tokenizer: Tokenizer) -> None:
    sample = make(prompt, answer)
    own_prompt, own_answer, *_ = sizes(sample, tokenizer, WHOLE)
    found_prompt, found_answer, context_cut, target_cut = sizes(sample, tokenizer, ROOM)
    assert found_prompt + found_answer <= 120
    if own_prompt + own_answer <= 120:
        assert (found_prompt, found_answer, context_cut, target_cut) == (own_prompt, own_answer, False, False)
    elif own_answer <= 40:
        assert (found_answer, context_cut, target_cut) == (own_answer, True, False)
        assert found_prompt + found_answer >= 115, "no more of the context is cut than a word"
    elif own_prompt <= 80:
        assert (found_prompt, found_answer, context_cut, target_cut) == (own_prompt, 120 - own_prompt, False, True)
    else:
        assert (found_answer, context_cut, target_cut) == (40, True, True)
        assert 75 <= found_prompt <= 80


def test_a_length_that_is_told_holds_too(tokenizer: Tokenizer) -> None:
    assert sizes(bare(60, 60), tokenizer, RowLengths(120, 90, 120))[1] == 90
    assert sizes(bare(60, 10), tokenizer, RowLengths(50, 120, 120))[0] <= 50
    *_, cut = sizes(bare(3, 60), tokenizer, RowLengths(50, 30, 120))
    assert cut
    assert sizes(bare(3, 60), tokenizer, RowLengths(50, 30, 120))[1] == 30


@pytest.mark.parametrize(
    ("lengths", "row", "prompt", "answer"),
    [
        (RowLengths(512, 256), 768, 512, 256),
        (RowLengths(512, 256, 2048), 768, 512, 256),
        (RowLengths(512, 256, 600), 600, 344, 256),
        (RowLengths(600, 600, 600), 600, 400, 200),
        (RowLengths(600, 100, 600), 600, 500, 100),
        (RowLengths(100, 600, 600), 600, 100, 500),
        (RowLengths(2, 2, 2), 2, 1, 1),
    ],
)
def test_what_is_kept_for_each(lengths: RowLengths, row: int, prompt: int, answer: int) -> None:
    assert (lengths.row, lengths.prompt, lengths.answer) == (row, prompt, answer)


def test_the_answers_of_a_pair_have_one_prompt(tokenizer: Tokenizer) -> None:
    row = {"prompt": words(60), "chosen": words(3), "rejected": words(60)}
    (pair,), report = encode_pairs([pair_from_row(row, "f:1")], tokenizer, ROOM)
    begin = pair.chosen.prompt_length
    assert pair.rejected.prompt_length == begin
    assert pair.chosen.input_ids[:begin] == pair.rejected.input_ids[:begin]
    assert max(pair.chosen.length, pair.rejected.length) <= 120
    assert report.truncated_target == 1


def test_pairs_keep_what_fits(tokenizer: Tokenizer) -> None:
    """A prompt of more than two thirds of a row, with short answers; and with one of them that needs more."""
    row = {"prompt": words(34), "chosen": words(2), "rejected": words(3)}
    (pair,), report = encode_pairs([pair_from_row(row, "f:1")], tokenizer, ROOM)
    assert pair.chosen.prompt_length > 80
    assert not report.truncated_context
    context = {"context": words(40), "question": "Which?", "answers": ["a"]}
    sample = sample_from_row(context, "f:1")
    chosen, rejected = replace(sample, target="a"), replace(sample, target=words(8))
    (pair,), report = encode_pairs([PairSample(chosen, rejected)], tokenizer, ROOM)
    assert report.truncated_context == 1
    assert pair.chosen.prompt_length == pair.rejected.prompt_length > 80
    assert 115 <= pair.rejected.length <= 120


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_writes_a_finished_turn_at_more_length(
    tokenizer: Tokenizer, tmp_path: Path, marked: bool
) -> None:
    """Than the generation prompt that opens it."""
    said = (
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        if marked
        else "{{ m.content }}{{ eos_token }}"
    )
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}### The assistant, which is very helpful, says now: "
        + said
        + "{% else %}U: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    source = resolve_model("__internal_testing__/tiny-random-llama", tmp_path / "cache", lambda _: None)
    shutil.copytree(source, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    other = load_tokenizer(tmp_path / "m")
    for prompt, answer in ((60, 3), (60, 60), (3, 60), (12, 12)):
        for lengths in (RowLengths(80, 80, 80), ROOM, RowLengths(80, 20, 80), RowLengths(60, 40)):
            example, *_ = encode_sample(chat(prompt, answer), other, lengths)
            assert example.length <= lengths.row
            assert example.label_count > 0
