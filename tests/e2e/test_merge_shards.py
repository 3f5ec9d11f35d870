"""Shards from the command line: cut, merge, and use them without merging; in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.cli import main
from arriero.formats.download import resolve_model

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random-llama", tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    degrees = ["--tensor_parallel_degree", "2", "--pipeline_parallel_degree", "2"]
    assert main(["convert", str(tiny), "--output_dir", str(folder), *degrees]) == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_convert_and_merge(shards: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(shards.glob("model-tp0?-of-02-pp0?-of-02.safetensors"))) == 4
    assert main(["merge", "--model_name_or_path", str(shards), "--output_path", str(tmp_path / "m")]) == 0
    assert f"merged model: {tmp_path / 'm'} (logits differ from the shards' by at most" in capsys.readouterr().out
    assert weights(tmp_path / "m") == weights(tiny)
    assert (tmp_path / "m/tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    arguments = ["--output_path", str(tmp_path / "n"), "--verify", "no", "--dtype", "bfloat16"]
    assert main(["merge", "--model_name_or_path", str(shards), *arguments]) == 0
    assert "(not compared)" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(tmp_path / "n/model.safetensors").values()} == {torch.bfloat16}


def test_only_the_first_of_several_processes_merges(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["merge", "--model_name_or_path", str(shards), "--output_path", str(tmp_path / "m")]) == 0
    assert not (tmp_path / "m").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(["merge", "--model_name_or_path", str(shards), "--output_path", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "config.json").exists()


def test_predict_from_shards_and_merge_on_the_way(
    shards: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max_new_tokens", "8", "--predict_file"]
    assert main(["predict", "--model_name_or_path", str(tiny), *options, str(tmp_path / "whole.json")]) == 0
    merged = ["--merge_tensor_parallel_path", str(tmp_path / "m")]
    assert main(["predict", "--model_name_or_path", str(shards), *options, str(tmp_path / "parts.json"), *merged]) == 0
    assert "merged model:" in capsys.readouterr().out
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
    assert weights(tmp_path / "m") == weights(tiny)
    # a model that is whole already is written there too
    merged = ["--merge_tensor_parallel_path", str(tmp_path / "copy")]
    assert main(["predict", "--model_name_or_path", str(tiny), *options, str(tmp_path / "whole.json"), *merged]) == 0
    assert weights(tmp_path / "copy") == weights(tiny)
    assert main(["chat", "--model_name_or_path", str(shards), "--prompt", "Hi", "--max_new_tokens", "4"]) == 0


def test_two_processes_predict_and_merge_once(shards: Path, tiny: Path, tmp_path: Path) -> None:
    """The seed's command: every process predicts, the first one prints, writes and merges."""
    options = ["--max_new_tokens", "8", "--predict_file", "p.json", "--merge_tensor_parallel_path", "m"]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "arriero"]
    result = subprocess.run(
        [*runner, "predict", "--model_name_or_path", str(shards), "--device", "cpu", *options],
        cwd=tmp_path,
        env={**os.environ, "ARRIERO_TIMEOUT": "30", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 answers: p.json") == 1
    assert result.stdout.count("merged model: m") == 1
    assert len((tmp_path / "p.json").read_text().splitlines()) == 2
    assert weights(tmp_path / "m") == weights(tiny)


def test_an_adapter_joins_a_base_of_shards(shards: Path, tiny: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "bias": "none"}
    base = load_file(tiny / "model.safetensors")
    update, expected = {}, dict(base)
    for name in [name for name in base if name.endswith("o_proj.weight")]:
        out, size = base[name].shape
        a, b = torch.randn(2, size, generator=generator), torch.randn(out, 2, generator=generator) / 9
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        update |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        expected[name] = base[name] + 2.0 * b @ a
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    save_file(update, tmp_path / "lora/adapter_model.safetensors")
    arguments = ["--lora_path", str(tmp_path / "lora"), "--output_path", str(tmp_path / "m"), "--dtype", "float32"]
    assert main(["merge", "--model_name_or_path", str(shards), *arguments]) == 0
    found = load_file(tmp_path / "m/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_refusals(shards: Path, tiny: Path, tmp_path: Path, refused: Refused) -> None:
    out = str(tmp_path / "out")
    assert "is one model already" in refused("merge", "--model_name_or_path", str(tiny), "--output_path", out)
    merge_path = ["--merge_tensor_parallel_path", str(tiny)]
    assert "is not empty" in refused("predict", "--model_name_or_path", str(shards), *merge_path)
    both = ["--merge_tensor_parallel_path", out, "--lora_path", "lora"]
    assert "run arriero merge" in refused("predict", "--model_name_or_path", str(shards), *both)
    convert = ["convert", str(tiny), "--output_dir", out]
    assert "cannot be shared out among 3" in refused(*convert, "--tensor_parallel_degree", "3")
    assert "pipeline stages" in refused(*convert, "--pipeline_parallel_degree", "99")
    assert not Path(out).exists()
