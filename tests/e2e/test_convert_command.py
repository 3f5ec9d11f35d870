"""`arriero convert` and `arriero download` as a user calls them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.formats.download import resolve_model
from arriero.formats.hf import load_model

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tiny(arriero: Call, tmp_path: Path) -> Path:
    result = arriero("download", "tiny-random-llama", ARRIERO_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder == tmp_path / "home" / "tiny-random-llama"
    return folder


def test_another_dtype_in_shards(arriero: Call, tmp_path: Path, tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    result = arriero("convert", str(tiny), "--output_dir", str(out), "--dtype", "bfloat16", "--max_shard_size", "200KB")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    expected = load_model(tiny).state_dict()
    for shard in shards:
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, expected[name].bfloat16())
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype is torch.bfloat16
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, load_model(out)(ids), atol=2e-2)
    assert transformers.AutoTokenizer.from_pretrained(out)("To be").input_ids[0] == 1


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "o"

    def line(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["convert", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    assert "is the input itself" in line(str(tiny), "--output_dir", str(tiny))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert "bad.gguf" in line(str(tmp_path / "bad.gguf"), "--output_dir", str(out))
    assert "'many'" in line(str(tiny), "--output_dir", str(out), "--max_shard_size", "many")
    assert "no such folder" in line(str(tmp_path / "nowhere"), "--output_dir", str(out))
    assert not out.exists()
    assert main(["convert", str(tiny), "--output_dir", str(out)]) == 0
    assert "--overwrite_output_dir" in line(str(tiny), "--output_dir", str(out))
    assert main(["convert", str(tiny), "--output_dir", str(out), "--overwrite_output_dir", "--dtype", "float16"]) == 0
    assert {parameter.dtype for parameter in load_model(out).parameters()} == {torch.float16}


def test_download_of_a_local_folder(arriero: Call, tiny: Path) -> None:
    result = arriero("download", str(tiny))
    assert result.returncode == 2
    assert "nothing to download" in result.stderr
