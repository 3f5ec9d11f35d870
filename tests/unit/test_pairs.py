"""Rows of two answers: TRL's and PaddleNLP's forms, what is refused, and what is kept of the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arriero.config.compatibility import check
from arriero.config.data import DataOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.option import specs_of
from arriero.config.parallel import ParallelOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.row_lengths import RowLengths
from arriero.data.pairs import encode_pairs, load_pairs, read_pairs
from arriero.data.rows.preferences import pair_from_row
from arriero.data.sft import IGNORE, Example
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import ArrieroError, ConfigError, DataError, FormatError, TrainingError
from arriero.formats.download import resolve_model
from arriero.parallel.processes import Processes
from arriero.training.preference_data import model_fingerprint, objective_of, stored_reference

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"), ("assistant", "No"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("__internal_testing__/tiny-random-llama", tmp_path_factory.mktemp("cache"), lambda _: None)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, False),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, True),
        ({"prompt": [USER], "chosen": "Yes", "rejected": "No"}, True),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, True),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, True),  # UltraFeedback
        ({"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, True),
        ({"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"}, True),  # LLaMA-Factory
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            True,
        ),
        ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, True),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, True),  # HH-RLHF
        ({"src": "Hi", "response": ["Yes", "No"], "sort": [1, 0]}, True),
        ({"src": ["Hi"], "tgt": [], "response": [["No"], ["Yes"]], "sort": [0, 1]}, True),
        ({"src": ["Hi"], "tgt": "", "response": ["No", "Yes"], "sort": [-1.5, 2.5]}, True),
    ],
)
def test_every_form_of_a_pair(row: dict[str, Any], chat: bool) -> None:
    pair = pair_from_row(row, "f:7")
    assert (pair.chosen.target, pair.rejected.target) == ("Yes", "No")
    for sample in (pair.chosen, pair.rejected):
        assert (sample.prompt, sample.history, sample.chat, sample.where) == ("Hi", (), chat, "f:7")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"instruction": "Hi", "chosen": "Yes", "rejected": "No"},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "Yes", "rejected": "No"},
        {"src": "Hi", "response": ["Yes", "No"], "sort": [1, 0]},
    ],
)
def test_a_system_beside_a_pair_goes_before_it(row: dict[str, Any]) -> None:
    pair = pair_from_row({**row, "system": "Be brief."}, "f:1")
    for sample, answer in ((pair.chosen, "Yes"), (pair.rejected, "No")):
        assert (sample.history, sample.prompt, sample.target, sample.chat) == (
            ({"role": "system", "content": "Be brief."},), "Hi", answer, True,
        )  # fmt: skip


def test_earlier_turns_are_history() -> None:
    row = {"src": ["a", "c"], "tgt": ["b"], "response": ["x", "y"], "sort": [0, 1], "system": "s"}
    pair = pair_from_row(row, "f:1")
    assert [turn["content"] for turn in pair.chosen.history] == ["s", "a", "b"]
    assert pair.chosen.target == "y"
    dialogue = "\n\nHuman: a:\n\nHuman: b?\n\nAssistant: c\n\nd\n\nHuman: e\n\nAssistant:"
    pair = pair_from_row({"chosen": f"{dialogue} x", "rejected": f"{dialogue} y Human: z"}, "f:1")
    assert [turn["content"] for turn in pair.chosen.history] == ["a:", "b?", "c\n\nd"]
    assert (pair.chosen.prompt, pair.chosen.target, pair.rejected.target) == ("e", "x", "y Human: z")
    turns = [USER, GOOD, USER]
    pair = pair_from_row({"prompt": turns, "chosen": [GOOD], "rejected": [BAD]}, "f:1")
    assert pair.chosen.history == (USER, GOOD) == pair.rejected.history


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a JSON object is expected"),
        ({"prompt": "a", "completion": "b"}, "'chosen' and 'rejected' are needed"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is missing"),
        ({"chosen": "a", "rejected": "b"}, "has no 'prompt'; it has chosen, rejected"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be a string or a list of turns, found a number"),
        (
            {"prompt": "a", "completion": "b", "label": True},
            "'label' judges a single one, for KTO, which is not supported",
        ),
        (
            {"instruction": "a", "chosen": {"from": "gpt"}, "rejected": "b"},
            "must be a string, as 'instruction' is, found an obj",
        ),
        (
            {"prompt": [{"role": "system", "content": "x"}, USER], "chosen": "b", "rejected": "c", "system": "y"},
            "'system' and the system turn differ",
        ),
        (
            {"prompt": [USER], "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]},
            "'chosen' ends with a turn that is not to be learned",
        ),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' must be a string"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "'chosen': the last turn must be the assistant's"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "a 'user' turn is expected"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]},
            "differ in their last turn only",
        ),
        ({"prompt": [USER], "chosen": [{"role": "wizard", "content": "x"}], "rejected": [BAD]}, "unknown role"),
        ({"src": "a", "response": ["b"], "sort": [1, 0]}, "a list of two answers"),
        ({"src": "a", "response": ["b", "c"]}, "'sort' must be two numbers"),
        ({"src": "a", "response": ["b", "c"], "sort": [True, False]}, "'sort' must be two numbers"),
        ({"src": "a", "response": ["b", "c"], "sort": [1, 1]}, "neither is preferred"),
        ({"src": "a", "response": [["b", "d", "e"], ["c"]], "sort": [1, 0]}, "must be one answer"),
        ({"src": ["a", "b"], "response": ["b", "c"], "sort": [1, 0]}, "'src' has 2 turns and 'tgt' 0"),
        ({"response": ["b", "c"], "sort": [1, 0]}, "'src' has 0 turns"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match="f:3") as caught:
        pair_from_row(row, "f:3")
    assert message in str(caught.value)


def learned(row: Example) -> list[int]:
    return [label for label in row.labels if label != IGNORE]


def test_both_answers_follow_one_prompt_and_cuts_are_counted(tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "Which number follows one?", "chosen": "two", "rejected": "three"},
        {"prompt": "word " * 40, "chosen": "yes", "rejected": "yes"},
        {"prompt": "word", "chosen": "no", "rejected": "a long answer " * 20},
    ]
    pairs, report = encode_pairs([pair_from_row(row, "f:1") for row in rows], tokenizer, RowLengths(24, 8))
    first = pairs[0]
    begin = first.chosen.prompt_length
    assert first.chosen.input_ids[:begin] == first.rejected.input_ids[:begin]
    assert tokenizer.decode(learned(first.chosen), skip_special_tokens=True).strip() == "two"
    assert all(learned(row)[-1] == tokenizer.eos_token_id for pair in pairs for row in pair.rows)
    assert (report.pairs, report.truncated_context, report.truncated_target, report.equal) == (3, 1, 1, 1)
    assert "warning: 1 pairs have two equal answers" in str(report)
    assert report.longest <= 32
    assert "; 3 pairs are bare text, while chat and serve ask through the model's chat template" in str(report)


def test_only_the_last_answer_of_a_conversation_is_compared(tokenizer: Tokenizer) -> None:
    row = {"src": ["a", "c"], "tgt": ["b"], "response": ["x", "y"], "sort": [0, 1]}
    (pair,), report = encode_pairs([pair_from_row(row, "f:1")], tokenizer, RowLengths(64, 8))
    assert tokenizer.decode(learned(pair.chosen), skip_special_tokens=True).strip() == "y"
    assert "bare text" not in str(report)


def test_files_and_limits(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "dev.jsonl").write_text(json.dumps(rows[0]))
    found = load_pairs(str(tmp_path), ["train", "dev"], {"train": 3, "dev": None})
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 3, "dev": 1}
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.jsonl", "no such file"), ("empty.jsonl", "holds no pair")):
        with pytest.raises(DataError, match=message):
            read_pairs(tmp_path / name)


# Options


def options(**changes: Any) -> list[Any]:
    given: dict[type, dict[str, Any]] = {
        DataOptions: {"dataset_path": "rows.jsonl"},
        OptimizationOptions: {},
        ParallelOptions: {},
        QuantizationOptions: {},
        PreferenceOptions: {"preference": "dpo"},
    }
    for kind, values in given.items():
        values |= {name: value for name, value in changes.items() if name in {spec.name for spec in specs_of(kind)}}
    return [kind(**values) for kind, values in given.items()]


def test_names_and_defaults_of_the_losses() -> None:
    assert objective_of(PreferenceOptions(preference="sigmoid")).kind == "dpo"
    assert objective_of(PreferenceOptions(preference="ipo")).beta == 0.1
    assert objective_of(PreferenceOptions(preference="simpo")).beta == 2.0
    assert objective_of(PreferenceOptions(preference="simpo", dpo_beta=1.0)).beta == 1.0
    for wrong in ({"dpo_beta": 0.0}, {"dpo_label_smoothing": 0.5}, {"simpo_gamma": -1.0}, {"preference": "kto"}):
        with pytest.raises(ConfigError):
            PreferenceOptions(**wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_with_do_generation": True},
        {"packing": False},
        {"max_tokens_per_batch": 512},
        {"task_name": "squad"},
        {"dataset_path": "a.jsonl:2,b.jsonl:1"},
        {"dataset_path": None},
        {"context_parallel_degree": 2},
        {"label_smoothing": 0.1},
        {"qat": True},
    ],
)
def test_what_does_not_go_with_pairs_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--preference dpo"):
        check(options(**changes))
    check(options(preference=None, **{name: value for name, value in changes.items() if name != "dataset_path"}))


def test_options_of_another_loss_have_no_effect() -> None:
    names = {"dpo_beta": 0.2, "dpo_label_smoothing": 0.1, "simpo_gamma": 0.5, "orpo_lambda": 0.2}
    for kind, used in {"dpo": 2, "ipo": 1, "simpo": 2, "orpo": 1}.items():
        warnings = check(options(preference=kind, **names), frozenset(names))
        assert len(warnings) == 4 - used, kind
    assert len(check(options(preference=None, **names), frozenset(names))) == 4
    assert check(options(train_on="last"), frozenset({"train_on"}))[0].startswith("--train_on has no effect")


# The reference that a run keeps

KNOWN = {"model": "m", "train": "t", "dev": "d"}
SIZES = {"train": 3, "dev": 2}


def keep(path: Path, **changes: str) -> Path:
    tensors = {"train": torch.arange(6.0).view(3, 2), "dev": torch.arange(4.0).view(2, 2)}
    save_file(tensors, path, metadata={**KNOWN, **changes})
    return path


def test_a_kept_reference_is_that_of_the_same_pairs(tmp_path: Path) -> None:
    found = stored_reference(keep(tmp_path / "a"), KNOWN, SIZES, Processes())
    assert found["train"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found["dev"].shape == (2, 2)
    assert list(stored_reference(keep(tmp_path / "a", dev="other"), KNOWN, SIZES, Processes())) == ["train"]
    assert stored_reference(tmp_path / "none", KNOWN, SIZES, Processes()) == {}


def test_a_kept_reference_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"\x00" * 40)
    cases: list[tuple[Path, dict[str, int], type[ArrieroError]]] = [
        (keep(tmp_path / "a", model="other"), SIZES, TrainingError),
        (keep(tmp_path / "b"), {"train": 4, "dev": 2}, FormatError),
        (damaged, SIZES, FormatError),
    ]
    for path, sizes, error in cases:
        with pytest.raises(error, match=path.name):
            stored_reference(path, KNOWN, sizes, Processes())


def test_a_model_is_known_by_its_weights(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder, None)
    assert model_fingerprint(folder, None) == first
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert model_fingerprint(tmp_path, None) == first
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(tmp_path, None) != first
