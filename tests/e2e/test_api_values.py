"""What the Python functions take beside the verbs' options: forms of answers, rows in memory, torch's own types."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

import arriero

TINY = "__internal_testing__/tiny-random-llama"
ROWS = [{"src": f"Load {i} is for", "tgt": f"house {i % 3}"} for i in range(8)]
RUN: dict[str, Any] = {"lora": True, "learning_rate": 1e-2, "max_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model() -> arriero.Model:
    return arriero.load(TINY, device="cpu")


def test_answers_have_the_form_that_is_asked_for(model: arriero.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"load": {"enum": ["salt", "silver"]}, "sound": {"type": "boolean"}},
        "required": ["load", "sound"],
        "additionalProperties": False,
    }
    for form in (schema, json.dumps(schema)):
        jsonschema.validate(json.loads(model.chat("A load?", json_schema=form, max_new_tokens=200)), schema)
    assert re.fullmatch("[ab]{3}", model.generate("x", regex="[ab]{3}", max_new_tokens=9).text)
    assert model.generate("x", choices=("yes", "no"), max_new_tokens=9).text in ("yes", "no")
    assert "".join(model.stream("x", grammar='start: "mule"', max_new_tokens=9)) == "mule"
    params = arriero.SamplingParams(max_new_tokens=9, structure=arriero.Structure("choice", ["mule"]))
    assert model.generate("x", params).text == "mule"
    for wrong, message in (
        ({"choices": "yes"}, "choices takes a list of texts"),
        ({"choices": []}, "empty"),
        ({"regex": 3}, "must be text"),
        ({"regex": "("}, "cannot be used"),
        ({"json_schema": {1}}, "must be text"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar both say what form the answer has"),
    ):
        with pytest.raises(arriero.ArrieroError, match=message):
            model.generate("x", **wrong)  # type: ignore[call-overload]
    with pytest.raises(arriero.ConfigError, match=r"SamplingParams\(structure=arriero.Structure\('regex', ...\)\)"):
        model.generate("x", arriero.SamplingParams(), regex="a")
    with pytest.raises(arriero.ConfigError, match="params is of type dict"):
        model.generate("x", {"seed": 3})  # type: ignore[call-overload]


def test_lengths_of_transformers_are_refused(model: arriero.Model) -> None:
    for name, ours in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        with pytest.raises(arriero.ConfigError, match=f"takes no {name}: .* say {ours}"):
            model.generate("x", **{name: 8})  # type: ignore[call-overload]


def test_truth_is_no_token(model: arriero.Model) -> None:
    for call in (model.generate, model.logits, model.perplexity, model.encode):
        with pytest.raises(arriero.DataError, match="a prompt is a text, a conversation or a list of token ids"):
            call([True, False])  # type: ignore[operator]
    with pytest.raises(arriero.ConfigError, match="window is '8': it must be a whole number"):
        model.perplexity("a b", window="8")  # type: ignore[arg-type]


def test_types_of_torch_and_their_names(model: arriero.Model, tmp_path: Path) -> None:
    assert (
        repr(model)
        == f"<arriero.Model {str(model.folder)!r}: {model.config.num_parameters():,} parameters, float32, cpu>"
    )
    for dtype in (torch.bfloat16, "bf16", "bfloat16"):
        half = arriero.load(TINY, device=torch.device("cpu"), dtype=dtype)  # type: ignore[arg-type]
        assert next(half.module.parameters()).dtype == torch.bfloat16
        saved = model.save(tmp_path / str(dtype), dtype=dtype)
        assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {torch.bfloat16}
    for wrong in (torch.float64, "float64", "int3", torch.int8):
        for call in (
            lambda dtype: arriero.load(TINY, dtype=dtype),
            lambda dtype: model.save(tmp_path / "x", dtype=dtype),
        ):
            with pytest.raises(arriero.ConfigError, match="one of auto, float32, float16, bfloat16, fp32, fp16, bf16"):
                call(wrong)


def test_rows_in_memory_train_as_those_of_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = arriero.finetune(TINY, dataset_path=tmp_path / "rows.jsonl", output_dir=tmp_path / "a", **RUN)
    of_list = arriero.finetune(TINY, dataset_path=ROWS, output_dir=tmp_path / "b", **RUN)
    ours, theirs = (load_file(run.folder / "adapter_model.safetensors") for run in (of_list, of_file))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    # what config.yaml names is there, so that the run can go on
    path = re.search(r"dataset_path: (.*)", (of_list.folder / "config.yaml").read_text())
    assert path is not None
    assert [json.loads(line) for line in Path(path[1]).read_text().splitlines()] == ROWS
    longer = {**RUN, "max_steps": 3, "resume_from_checkpoint": "auto"}
    arriero.finetune(TINY, dataset_path=ROWS, output_dir=tmp_path / "b", **longer)
    scores = arriero.evaluate(TINY, dataset_path=tmp_path / "rows.jsonl", device="cpu")
    assert arriero.evaluate(TINY, dataset_path=iter(ROWS), device="cpu") == scores
    with pytest.raises(arriero.ConfigError, match="is not empty"):
        arriero.finetune(TINY, dataset_path=ROWS[:3], output_dir=tmp_path / "b", **RUN)
    assert len(list((tmp_path / "b.rows").iterdir())) == 1  # the refused one left none


def test_splits_in_memory(tmp_path: Path) -> None:
    parts = {"train": ROWS[:6], "validation": ROWS[6:]}
    run = arriero.finetune(TINY, dataset_path=parts, output_dir=tmp_path / "c", do_eval=True, **RUN)
    scores = arriero.evaluate(TINY, adapter=run.folder, dataset_path=ROWS[6:], device="cpu")
    told = [json.loads(line) for line in (run.folder / "train_log.jsonl").read_text().splitlines()]
    assert scores["loss"] == pytest.approx(
        next(line["eval_loss"] for line in reversed(told) if "eval_loss" in line), rel=1e-5
    )


def test_rows_are_held_out_of_training_rows_alone(tmp_path: Path) -> None:
    with pytest.raises(
        arriero.ConfigError, match="val_size holds rows out of the training rows, and dataset_path has dev"
    ):
        arriero.finetune(
            TINY, dataset_path={"train": ROWS, "dev": ROWS}, val_size=0.5, output_dir=tmp_path / "d", **RUN
        )
    run = arriero.finetune(TINY, dataset_path=ROWS, val_size=2, do_eval=True, output_dir=tmp_path / "e", **RUN)
    assert "eval_loss" in run.results


def test_merge_resolves_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ARRIERO_HOME", str(Path(arriero.download(TINY)).parent))
    run = arriero.finetune(TINY, dataset_path=ROWS, output_dir="~/run", **RUN)
    assert run.folder == tmp_path / "run"
    merged = arriero.merge(TINY, "~/merged", adapter="~/run", device="cpu")
    assert merged == tmp_path / "merged"
    assert (merged / "config.json").is_file()
