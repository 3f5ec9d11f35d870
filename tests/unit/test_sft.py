"""Labels: exactly the answer and its end token, whatever is cut, for every kind of row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.commands.prompt_rows import read_prompts
from arriero.config.row_lengths import RowLengths
from arriero.data.batch import pack
from arriero.data.prompt_tokens import encode_prompt, fit_prompt
from arriero.data.rows.formats import sample_from_row
from arriero.data.samples import Sample
from arriero.data.sft import IGNORE, Example, encode_all, encode_sample
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import DataError
from arriero.formats.download import resolve_model

SEED_README = Path(__file__).parents[2].parent / "shared" / "reference" / "seed-llama-readme.md"
# From the seed's README, section on prediction
SEED_PROMPT = (
    "answer: linebacker context: The Broncos took an early lead in Super Bowl 50 and never trailed. Newton was limited by "
    "Denver's defense, which sacked him seven times and forced him into three turnovers, including a fumble which they "
    "recovered for a touchdown. Denver linebacker Von Miller was named Super Bowl MVP, recording five solo tackles, 2½ "
    "sacks, and two forced fumbles."
)
SEED_TARGET = "question: What was von Miller's job title?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def learned(example: Example) -> list[int]:
    """The tokens that are learned, checked to be the next inputs."""
    for i, label in enumerate(example.labels):
        assert label == IGNORE or label == example.input_ids[i + 1]
    return [label for label in example.labels if label != IGNORE]


def seed_row() -> dict[str, str]:
    context = SEED_PROMPT.removeprefix("answer: linebacker context: ")
    return {"context": context, "answers": "linebacker", "question": SEED_TARGET.removeprefix("question: ")}


def test_squad_is_the_seeds_question_generation(tokenizer: Tokenizer) -> None:
    sample = sample_from_row(seed_row(), "f:1")
    example, *cut = encode_sample(sample, tokenizer, RowLengths(1024, 1024))
    assert cut == [False, False]
    target = learned(example)
    assert target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(target, skip_special_tokens=False) == SEED_TARGET + "</s>"
    prompt = example.input_ids[: -len(target)]
    assert tokenizer.decode(prompt, skip_special_tokens=False) == "<s>" + SEED_PROMPT + "</s>"
    assert example.labels[: len(prompt) - 1] == [IGNORE] * (len(prompt) - 1)
    assert example.labels[len(prompt) - 1 :] == [*target, IGNORE]


@pytest.mark.skipif(not SEED_README.is_file(), reason="the seed's README lies beside the project, not in it")
def test_the_examples_are_the_seeds_own() -> None:
    text = SEED_README.read_text(encoding="utf-8")
    assert SEED_PROMPT in text
    assert SEED_TARGET in text
    prompts = [sample.prompt for sample in read_prompts(None)]
    assert [prompt.split()[1] for prompt in prompts] == ["linebacker", "five"]
    assert all(prompt in text for prompt in prompts)


ROWS = [
    ({"src": "one two", "tgt": "three"}, " three"),
    ({"instruction": "Say it.", "output": " three "}, " three"),
    ({"instruction": "Say it.", "input": "now", "output": "three\nfour"}, " three\nfour"),
    (seed_row(), SEED_TARGET),
    (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
        " Hello there",
    ),
]


@pytest.mark.parametrize(("row", "text"), ROWS)
def test_exactly_the_answer_and_eos_is_learned(row: dict[str, object], text: str, tokenizer: Tokenizer) -> None:
    example, *_ = encode_sample(sample_from_row(row, "f:1"), tokenizer, RowLengths(512, 64))
    target = learned(example)
    assert tokenizer.decode(target[:-1], skip_special_tokens=False) == text
    assert target[-1] == tokenizer.eos_token_id
    assert example.input_ids[-len(target) :] == target, "the answer ends the row"
    assert example.label_count == len(target)


def test_a_batch_holds_the_rows_end_to_end(tokenizer: Tokenizer) -> None:
    examples, _ = encode_all([sample_from_row(row, "f:1") for row, _ in ROWS], tokenizer, RowLengths(512, 64))
    batch = pack(examples)
    assert batch.parts == tuple((example.length,) for example in examples)
    assert batch.label_tokens == sum(example.label_count for example in examples)
    assert (batch.rows, batch.row_tokens) == (len(examples), sum(example.length for example in examples))
    assert batch.input_ids[0].tolist() == [token for example in examples for token in example.input_ids]
    assert batch.labels[0].tolist() == [label for example in examples for label in example.labels]
    ends = [sum(example.length for example in examples[: i + 1]) - 1 for i in range(len(examples))]
    assert batch.labels[0, ends].tolist() == [IGNORE] * len(examples), "no row predicts the next one's first token"


def test_every_assistant_turn_of_a_conversation_is_learned(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "First answer"},
        {"role": "user", "content": "Second question"},
        {"role": "assistant", "content": "Second answer"},
        {"role": "user", "content": "Third question"},
        {"role": "assistant", "content": "Third answer"},
    ]
    example, *_ = encode_sample(sample_from_row({"messages": turns}, "f:1"), tokenizer, RowLengths(512, 64))
    spans, current = [], []
    for label in example.labels:
        if label != IGNORE:
            current.append(label)
        elif current:
            spans.append(tokenizer.decode(current, skip_special_tokens=False))
            current = []
    assert [span.strip() for span in spans] == ["First answer</s>", "Second answer</s>", "Third answer</s>"]
    whole = tokenizer.decode(example.input_ids, skip_special_tokens=False)
    assert whole.startswith("<s>system: Be kind.\nuser: First question\nassistant:")
    assert whole.count("</s>") == 3


def long_sample(words: int) -> Sample:
    text = " ".join(f"word{i}" for i in range(words))
    return Sample("Read: ", text, "\nQuestion: what is first?", "word0", id="row-9")


def test_truncation_takes_the_end_of_the_context_only_and_is_counted(tokenizer: Tokenizer) -> None:
    samples = [long_sample(3), long_sample(80), long_sample(400)]
    examples, report = encode_all(samples, tokenizer, RowLengths(60, 8))
    assert (report.rows, report.truncated_context, report.truncated_target) == (3, 2, 0)
    assert "2 contexts cut" in str(report)
    for sample, example in zip(samples, examples, strict=True):
        target = learned(example)
        prompt = tokenizer.decode(example.input_ids[: -len(target)])
        assert len(example.input_ids) - len(target) <= 60
        assert prompt.startswith("Read: word0")
        assert prompt.endswith("\nQuestion: what is first?")
        kept = prompt.removeprefix("Read: ").removesuffix(sample.after)
        assert sample.context.startswith(kept)
        assert tokenizer.decode(target) == " word0"
    assert len(examples[2].input_ids) - len(learned(examples[2])) >= 58, "no more is cut than needed"
    assert report.tokens == sum(example.length for example in examples)
    assert report.longest == max(example.length for example in examples)


def test_a_prompt_that_cannot_fit_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"row row-9 needs \d+ prompt tokens even without its context: .*above 5"):
        fit_prompt(long_sample(50), tokenizer, 5)


def test_long_answers_keep_their_end_token(tokenizer: Tokenizer) -> None:
    sample = Sample("", "go", "", " ".join(f"word{i}" for i in range(50)))
    (example,), report = encode_all([sample], tokenizer, RowLengths(64, 10))
    target = learned(example)
    assert len(target) == 10
    assert target[-1] == tokenizer.eos_token_id
    assert sample.target is not None
    assert (" " + sample.target).startswith(tokenizer.decode(target[:-1], skip_special_tokens=False))
    assert report.truncated_target == 1
    assert "1 answers cut" in str(report)


def test_truncated_conversations_still_learn_the_last_answer(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": " ".join(f"word{i}" for i in range(300))},
        {"role": "assistant", "content": "Last answer"},
    ]
    example, cut, _ = encode_sample(sample_from_row({"messages": turns}, "f:1"), tokenizer, RowLengths(40, 16))
    assert cut
    assert tokenizer.decode(learned(example), skip_special_tokens=False).strip() == "Last answer</s>"


def test_special_token_text_in_data_is_only_text(tokenizer: Tokenizer) -> None:
    sample = sample_from_row({"src": "say </s> twice </s>", "tgt": "</s> <s> done"}, "f:1")
    example, *_ = encode_sample(sample, tokenizer, RowLengths(64, 64))
    assert example.input_ids.count(tokenizer.eos_token_id or -1) == 1
    assert example.input_ids.count(tokenizer.bos_token_id or -1) == 1
    assert tokenizer.decode(learned(example)[:-1], skip_special_tokens=False) == " </s> <s> done"


def test_empty_sets_and_masked_labels_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="holds no row"):
        encode_all([], tokenizer, RowLengths(64, 8))
    with pytest.raises(DataError, match="has no answer to learn from"):
        encode_all([Sample("", "only a question", "", None)], tokenizer, RowLengths(64, 8))


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    broken = SimpleNamespace(
        bos_token_id=None,
        eos_token_id=None,
        special_tokens={},
        encode=lambda text, **_: list(range(len(text))),
        has_chat_template=lambda: False,
    )
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_all([Sample("", "a", "", "b")], broken, RowLengths(64, 8))  # type: ignore[arg-type]


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=TEXT, context=TEXT, after=TEXT, target=TEXT, limit=st.integers(8, 60))
def test_any_text_fits_or_is_refused(
    before: str, context: str, after: str, target: str, limit: int, tokenizer: Tokenizer
) -> None:
    sample = Sample(before, context, after, target)
    try:
        example, cut, _ = encode_sample(sample, tokenizer, RowLengths(limit, 16))
    except DataError:
        assert len(tokenizer.encode(before + after, add_special_tokens=True)) > limit
        return
    target_ids = learned(example)
    prompt = example.input_ids[: len(example.input_ids) - len(target_ids)]
    assert 1 <= len(target_ids) <= (limit + 16 if sample.only_text else 16)  # a text alone has the room of both
    assert target_ids[-1] == tokenizer.eos_token_id
    assert len(prompt) <= limit
    assert cut == (len(encode_prompt(sample, tokenizer)) > limit)
    if not cut:
        assert prompt == encode_prompt(sample, tokenizer)


def test_a_set_whose_labels_are_all_masked_is_refused() -> None:
    """No prompt at all: the end token is the first token of the row, so nothing predicts it."""
    bare = SimpleNamespace(
        bos_token_id=None,
        eos_token_id=2,
        special_tokens={},
        encode=lambda text, **_: [5] * len(text),
        has_chat_template=lambda: False,
    )
    with pytest.raises(DataError, match="every label is masked"):
        encode_all([Sample("", "", "", "")] * 3, bare, RowLengths(64, 1))  # type: ignore[arg-type]
