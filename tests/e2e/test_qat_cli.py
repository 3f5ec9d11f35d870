"""Quantization-aware training through the command line: train, convert, score either form, merge, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.formats import hf
from arriero.formats.download import resolve_model
from arriero.formats.quantized import file_state
from arriero.quantization.linear import QuantizedLinear

TINY = "__internal_testing__/tiny-random-llama"
DATA = ("--dataset_path", "data", "--src_length", "64")
TRAINING = (
    *("finetune", "--model_name_or_path", TINY, *DATA, "--qat", "--do_eval", "--max_steps", "4", "--save_steps", "2"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "3e-3", "--disable_tqdm", "True", "--report_to", "none"),
)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    rows = [json.dumps({"src": f"what follows {i} ?", "tgt": str(i + 1)}) + "\n" for i in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows))
    (tmp_path / "data" / "dev.jsonl").write_text("".join(rows[:4]))
    return tmp_path


def loss_of(capsys: pytest.CaptureFixture[str], *model: str) -> float:
    """By `arriero evaluate`, to its four digits."""
    capsys.readouterr()
    assert main(["evaluate", *model, *DATA]) == 0
    return next(float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("loss"))


def trained_loss(folder: Path) -> float:
    return float(json.loads((folder / "all_results.json").read_text())["eval_loss"])


def test_train_convert_and_score(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAINING, "--output_dir", "run"]) == 0
    expected = pytest.approx(trained_loss(work / "run"), abs=1e-4)
    assert main(["convert", "run", "packed", "--to", "quantized"]) == 0
    model = hf.load_model(work / "packed")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert loss_of(capsys, "--model_name_or_path", "run") == expected
    assert loss_of(capsys, "--model_name_or_path", "packed") == expected
    # a checkpoint is converted alike; the last one is the run itself
    assert main(["convert", "run/checkpoint-4", "again", "--to", "quantized"]) == 0
    other = hf.load_model(work / "again")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))
    # without rounding the run is a plain model
    plain = hf.load_model(work / "run")
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())


def test_an_adapter_is_trained_rounded_with_its_base(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--lora", "--qat_type", "A8W4", "--qat_activation", "moving_average", "--merge_weights")
    assert main([*TRAINING, *options, "--output_dir", "run"]) == 0
    expected = pytest.approx(trained_loss(work / "run"), abs=1e-4)
    assert main(["convert", "run", "packed", "--to", "quantized"]) == 0
    assert loss_of(capsys, "--model_name_or_path", TINY, "--lora_path", "run") == expected
    assert loss_of(capsys, "--model_name_or_path", "packed") == expected
    assert loss_of(capsys, "--model_name_or_path", "run/merged") == expected
    assert main(["merge", "--model_name_or_path", TINY, "--lora_path", "run", "--output_path", "joined"]) == 0
    assert loss_of(capsys, "--model_name_or_path", "joined") == expected  # rounded as it was trained
    # gone on with, the run is the same as in one go
    before = (work / "run" / "qat.safetensors").read_bytes()
    assert main([*TRAINING, *options, "--output_dir", "run", "--resume_from_checkpoint", "run/checkpoint-2"]) == 0
    assert trained_loss(work / "run") == expected
    assert len((work / "run" / "qat.safetensors").read_bytes()) == len(before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAINING, "--output_dir", "run", "--qat_group_size", "7"], ("--qat_group_size 7", "q_proj")),
        ([*TRAINING, "--output_dir", "run", "--lora", "--lora_dora"], ("--qat", "--lora_dora")),
        ([*TRAINING, "--output_dir", "run", "--lora", "--lora_init", "pissa"], ("--qat", "pissa")),
        ([*TRAINING, "--output_dir", "run", "--do_train", "False"], ("--qat", "--resume_from_checkpoint")),
        (["convert", TINY, "packed", "--to", "quantized"], ("--to quantized", "arriero quantize")),
        (
            ["convert", TINY, "packed", "--to", "quantized", "--tensor_parallel_degree", "2"],
            ("--to quantized", "--tensor_parallel_degree"),
        ),
    ],
)
def test_refusals(arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words), error


def test_a_broken_range_file_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAINING, "--output_dir", "run"]) == 0
    (work / "run" / "qat.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert main(["convert", "run", "packed", "--to", "quantized"]) == 2
    assert "qat.safetensors" in capsys.readouterr().err
    assert not (work / "packed").exists()


def test_the_base_that_is_given_and_the_comparison(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TRAINING, "--lora", "--qat_type", "W4", "--output_dir", "run"]) == 0
    assert main(["convert", "run", "packed", "--to", "quantized"]) == 0
    assert "compared: all " in capsys.readouterr().err
    # the adapter moves to where its base has another name
    config = work / "run" / "adapter_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps(named | {"base_model_name_or_path": "nowhere"}))
    assert main(["convert", "run", "lost", "--to", "quantized"]) == 2
    base = resolve_model(TINY)
    shutil.copytree(base, work / "base")
    assert main(["convert", "run", "again", "--to", "quantized", "--base_model", "base", "--verify", "no"]) == 0
    told = capsys.readouterr().err
    assert "run was trained on nowhere" in told
    assert "compared: no" in told
    one, other = (load_file(work / name / "model.safetensors") for name in ("packed", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # what is packed wrong is found out, and not kept
    monkeypatch.setattr("arriero.engine.qat.file_state", lambda *given: _one_off(file_state(*given)))
    options = ["--to", "quantized", "--base_model", "base"]
    assert main(["convert", "run", "wrong", *options]) == 2
    assert "o_proj.weight_scale differs from what was packed: nothing was kept" in capsys.readouterr().err
    assert not (work / "wrong").exists()
    assert main(["convert", "run", "wrong", *options, "--verify", "no"]) == 0


def _one_off(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    return {**state, name: state[name] * 1.01}


def test_a_model_has_no_base(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAINING, "--output_dir", "run"]) == 0
    assert main(["convert", "run", "packed", "--to", "quantized", "--base_model", TINY, "--verify"]) == 0
    told = capsys.readouterr().err
    assert "warning: --base_model has no effect: this is a model and no adapter" in told
    assert "--verify has no effect" not in told
    assert "tensors equal; logits of a prompt differ from the trained model's by at most" in told


def test_half_precision_between_the_sum_and_the_rounding_is_told(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base in 16 bits the sum is rounded twice in a merged model: other integers than those that were trained."""
    base = resolve_model(TINY)
    hf.save_model(hf.load_model(base, "bfloat16"), hf.read_config(base), "half", extra_files_from=base)
    training = [*TRAINING, "--lora", "--qat_type", "W4", "--merge_weights", "--model_name_or_path", "half"]
    line = "arriero convert run OUTPUT --to quantized, and not the merged model"
    assert main([*training, "--learning_rate", "3e-2", "--output_dir", "run"]) == 0
    assert line in capsys.readouterr().out
    assert main(["merge", "--model_name_or_path", "half", "--lora_path", "run", "--output_path", "joined"]) == 0
    assert line in capsys.readouterr().out
    merge = [
        "merge",
        "--model_name_or_path",
        "half",
        "--lora_path",
        "run",
        "--output_path",
        "wide",
        "--dtype",
        "float32",
    ]
    assert main(merge) == 0
    assert line not in capsys.readouterr().out
    for name in ("run", "joined", "wide"):
        assert main(["convert", name, f"{name}-packed", "--to", "quantized", "--dtype", "bfloat16"]) == 0
    trained, joined, wide = (load_file(work / f"{name}-packed/model.safetensors") for name in ("run", "joined", "wide"))
    assert any(not torch.equal(tensor, joined[name]) for name, tensor in trained.items())
    assert all(torch.equal(tensor, wide[name]) for name, tensor in trained.items())
