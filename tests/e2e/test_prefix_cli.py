"""Prefix tuning by the command line, on the tiny model: train, resume, go on, score, predict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TINY = "__internal_testing__/tiny-random-llama"
ROWS = [{"src": f"what follows {i} ?", "tgt": str(i + 1)} for i in range(12)]
TRAINING = (
    *(
        "finetune",
        "--model_name_or_path",
        TINY,
        "--dataset_path",
        "data",
        "--disable_tqdm",
        "True",
        "--src_length",
        "64",
    ),
    *("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--per_device_train_batch_size", "2"),
    *("--learning_rate", "3e-2", "--lr_scheduler_type", "constant", "--report_to", "none"),
    *("--prefix_tuning", "True", "--num_prefix_tokens", "6", "--prefix_dropout", "0.1"),
)
NETWORK = ("--prefix_projection", "True", "--prefix_projection_hidden_size", "24")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the runs of this file."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    for name, rows in (("train", ROWS), ("dev", ROWS[:5])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def call(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(work)
        monkeypatch.setenv("ARRIERO_HOME", str(work / "home"))
        capsys.readouterr()
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}: {name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def oracle(work: Path, prefix: str) -> tuple[Any, Any]:
    """The base with the prefix in transformers and PEFT."""
    base = next((work / "home").rglob("config.json")).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, str(work / prefix)).eval(), tokenizer


@pytest.mark.parametrize("network", [(), NETWORK], ids=["plain", "network"])
def test_a_run_trains_resumes_and_goes_on(network: tuple[str, ...], work: Path, call: Call) -> None:
    whole, stopped, more = (f"{name}-{len(network)}" for name in ("whole", "stopped", "more"))
    code, out, err = call(*TRAINING, *network, "--do_eval", "True", "--output_dir", whole)
    assert code == 0, err
    assert "prefix: 6 keys and values a layer" in out
    names = {path.name for path in (work / whole).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert ("prefix_encoder.safetensors" in names) == bool(network)
    assert "model.safetensors" not in names
    scores = json.loads((work / whole / "all_results.json").read_text())

    assert call(*TRAINING, *network, "--max_steps", "2", "--output_dir", stopped)[0] == 0
    code, out, err = call(*TRAINING, *network, "--output_dir", stopped, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert "at step 2" in out
    for folder in ("checkpoint-4", "checkpoint-4/optimizer"):
        assert same(work / stopped / folder, work / whole / folder)

    code, out, err = call(
        *("evaluate", "--model_name_or_path", TINY, "--prefix_path", whole, "--dataset_path", "data"),
        *("--src_length", "64", "--output_dir", f"scores-{len(network)}"),
    )
    assert code == 0, err
    again = json.loads((work / f"scores-{len(network)}" / "eval_results.json").read_text())
    assert again["loss"] == pytest.approx(scores["eval_loss"], abs=1e-5), "the stored keys and values are those trained"

    # --prefix_path in training goes on from it: one step at a rate of nearly nothing leaves it as it is
    code, out, err = call(
        *(*TRAINING, "--prefix_path", whole, "--max_steps", "1", "--learning_rate", "1e-12", "--output_dir", more)
    )
    assert code == 0, err
    first, second = tensors(work / whole), tensors(work / more)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-6, rtol=0, msg=name)


def test_predict_equals_pefts_generate(work: Path, call: Call) -> None:
    assert call(*TRAINING, *NETWORK, "--output_dir", "answers")[0] == 0
    (work / "asked.jsonl").write_text("".join(json.dumps({"src": row["src"]}) + "\n" for row in ROWS[:4]))
    code, _, err = call(
        *("predict", "--model_name_or_path", TINY, "--prefix_path", "answers", "--data_file", "asked.jsonl"),
        *("--predict_file", "answers.jsonl", "--max_new_tokens", "8"),
    )
    assert code == 0, err
    model, tokenizer = oracle(work, "answers")
    for line, row in zip((work / "answers.jsonl").read_text().splitlines(), ROWS, strict=False):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(row["src"], add_special_tokens=False)]])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert json.loads(line)["output"] == text.strip()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--num_prefix_tokens", "2048"), ("--num_prefix_tokens 2048", "max_position_embeddings")),
        (("--lora", "True"), ("--lora", "--prefix_tuning")),
        (("--context_parallel_degree", "2"), ("--prefix_tuning", "--context_parallel_degree 2")),
        (("--prefix_path", "nowhere"), ("nowhere", "a prefix folder needs it")),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...], call: Call) -> None:
    code, _, err = call(*TRAINING, "--output_dir", "bad", *arguments)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("arriero") and "warning" not in line]
    for part in parts:
        assert part in line


def test_a_prefix_is_no_base_model(work: Path, call: Call) -> None:
    (work / "prefix").mkdir()
    (work / "prefix" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    code, _, err = call("predict", "--model_name_or_path", "prefix")
    assert code == 2
    assert "--prefix_path" in err
