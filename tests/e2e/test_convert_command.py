"""`arriero convert` and `arriero download` as a user calls them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.config.converting import GGUF_ALIASES, GGUF_TYPES
from arriero.errors import FormatError
from arriero.formats import opening
from arriero.formats.detection import detect
from arriero.formats.download import resolve_model
from arriero.formats.hf import load_model
from arriero.formats.source import ModelSource

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
    assert "no such file or folder" in line(str(tmp_path / "nowhere"), "--output_dir", str(out))
    gguf = str(tmp_path / "x.gguf")
    assert "needs a name that ends in .gguf" in line(str(tiny), str(out), "--to", "gguf")
    assert "is a file of GGUF" in line(str(tiny), gguf, "--to", "paddle")
    assert "has no shards" in line(str(tiny), gguf, "--tensor_parallel_degree", "2")
    assert "not cut by layers" in line(str(tiny), str(out), "--to", "meta", "--pipeline_parallel_degree", "2")
    assert "--gguf_type q8_0 is for GGUF files" in line(str(tiny), str(out), "--gguf_type", "q8_0")
    assert "give one of them" in line(str(tiny), gguf, "--gguf_type", "q8_0", "--dtype", "float16")
    assert "name its folder" in line(str(tiny / "model.safetensors"), str(out))
    assert not out.exists()
    assert main(["convert", str(tiny), "--output_dir", str(out)]) == 0
    assert "--overwrite_output_dir" in line(str(tiny), "--output_dir", str(out))
    assert main(["convert", str(tiny), gguf]) == 0
    assert "--overwrite_output_dir" in line(str(tiny), gguf)
    assert main(["convert", str(tiny), "--output_dir", str(out), "--overwrite_output_dir", "--dtype", "float16"]) == 0
    assert {parameter.dtype for parameter in load_model(out).parameters()} == {torch.float16}


def test_download_of_a_local_folder(arriero: Call, tiny: Path) -> None:
    result = arriero("download", str(tiny))
    assert result.returncode == 2
    assert "nothing to download" in result.stderr


def test_what_is_said(arriero: Call, tmp_path: Path, tiny: Path) -> None:
    result = arriero("convert", str(tiny), str(tmp_path / "x.gguf"), "--gguf_type", "q8_0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "x.gguf")
    assert f"{tiny.name}: HF model folder, 354,624 parameters" in result.stderr
    assert re.search(r"tensors rounded, by at most \d\.\de-03 of their norm \(model\..+\); logits", result.stderr)
    result = arriero("convert", str(tmp_path / "x.gguf"), str(tmp_path / "back"), "--verify", "no")
    assert re.search(r"\n  tensors .*\d+ Q8_0", result.stderr)
    assert "compared: no" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "home", "x.gguf"]


def test_options_without_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = resolve_model("tiny-random-llama", tmp_path / "home")
    arguments = ["--max_shard_size", "1MB", "--base_model", "llama-7b", "--verify", "no"]
    assert main(["convert", str(tiny), str(tmp_path / "x.gguf"), *arguments]) == 0
    error = capsys.readouterr().err
    assert "arriero: warning: --max_shard_size has no effect: gguf files are not cut by size" in error
    assert "arriero: warning: --base_model has no effect: this is a model and no adapter" in error


def test_a_gguf_kind_has_a_word_here() -> None:
    from arriero.formats.gguf.tensor_types import ALIASES, KINDS

    assert set(GGUF_TYPES) == set(KINDS)
    assert set(GGUF_ALIASES) == set(ALIASES)


@pytest.mark.parametrize("to", ["hf", "paddle", "meta", "gguf"])
def test_a_wrong_result_is_refused_and_removed(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = resolve_model("tiny-random-llama", tmp_path / "home")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    write = opening.write_model

    def wrong(source: ModelSource, target: Path, how: opening.Writing, progress: object = None) -> tuple[str, ...]:
        name = "model.layers.1.mlp.up_proj.weight"
        changed = load_model(tiny).state_dict()[name].clone()
        changed[3, 5] += 1e-3
        tensors = {**source.tensors, name: changed}
        return write(replace(source, tensors=tensors), target, how)

    monkeypatch.setattr("arriero.formats.conversion.write_model", wrong)
    assert main(["convert", str(tiny), str(out), "--to", to]) == 2
    error = capsys.readouterr().err
    assert f"{out}: model.layers.1.mlp.up_proj.weight differs from the original" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert main(["convert", str(tiny), str(out), "--to", to, "--verify", "no"]) == 0


def test_an_earlier_model_stays_when_its_successor_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "out"
    assert main(["convert", str(tiny), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise FormatError("not the same")

    monkeypatch.setattr("arriero.formats.conversion.compare", fails)
    assert main(["convert", str(tiny), str(out), "--overwrite_output_dir", "--dtype", "float16"]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_format_takes_the_place(tmp_path: Path) -> None:
    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "out"
    (tmp_path / "out").mkdir()
    (out / "notes.txt").write_text("mine")
    for to in ("paddle", "hf", "meta", "hf"):
        assert main(["convert", str(tiny), str(out), "--to", to, "--overwrite_output_dir"]) == 0
        assert detect(out).format == to
        assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob("*.pth"))
    assert not list(out.glob("*.pdparams"))


def test_the_bytes_are_copied(tmp_path: Path) -> None:
    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "out"
    assert main(["convert", str(tiny), str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_the_bytes_are_copied_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> int:
        raise OSError(errno.EXDEV, "across devices")

    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "out"
    monkeypatch.setattr(os, "copy_file_range", refuses)
    assert main(["convert", str(tiny), str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


PARTS = ("model_state.pdparams", "lora_config.json", "pre_caches.npy", "adapter_model.bin", "tokenizer.json")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_model_is_not_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, out = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"precious")
    assert main(["convert", str(tiny), str(out)]) == 2
    assert f"({name}); add --overwrite_output_dir" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(name, b"precious")]


def test_nothing_of_an_earlier_model_stays(tmp_path: Path) -> None:
    tiny = resolve_model("tiny-random-llama", tmp_path / "home")
    for to in ("hf", "paddle", "meta"):
        assert main(["convert", str(tiny), str(tmp_path / to), "--to", to, "--verify", "no"]) == 0
        (tmp_path / f"{to}-over").mkdir()
        out = tmp_path / f"{to}-over"
        for name in (*PARTS, "adapter_config.json", "params.json", "consolidated.00.pth", "chat_template.jinja"):
            (out / name).write_bytes(b"old")
        (out / "README.md").write_bytes(b"mine")
        (out / "adapter_model_notes").mkdir()
        arguments = ["--to", to, "--verify", "no", "--overwrite_output_dir"]
        assert main(["convert", str(tiny), str(out), *arguments]) == 0
        wanted = {path.name for path in (tmp_path / to).iterdir()}
        assert {path.name for path in out.iterdir()} == wanted | {"README.md", "adapter_model_notes"}
        assert detect(out).kind == to


def test_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, here = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    assert main(["convert", str(tiny), "."]) == 0
    assert detect(here).kind == "hf"
    assert here.stat().st_ino == inode  # a shell in it still sees it
    assert main(["convert", str(tiny), ""]) == 2


@pytest.mark.parametrize("exists", [True, False])
def test_through_a_symbolic_link(exists: bool, tmp_path: Path) -> None:
    tiny, real = resolve_model("tiny-random-llama", tmp_path / "home"), tmp_path / "real"
    if exists:
        real.mkdir()
    (tmp_path / "link").symlink_to(real, target_is_directory=True)
    assert main(["convert", str(tiny), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert detect(real).kind == "hf"


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = resolve_model("tiny-random-llama", tmp_path / "home")
    (tmp_path / "file").write_text("mine")
    assert main(["convert", str(tiny), str(tmp_path / "file")]) == 2
    assert "file is a file, and hf is a folder" in capsys.readouterr().err


def test_sigterm_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, before = resolve_model("tiny-random-llama", tmp_path / "home"), signal.getsignal(signal.SIGTERM)

    def ends(*_: object, **__: object) -> None:
        assert list(tmp_path.glob(".out.*.tmp"))
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr("arriero.formats.conversion.compare", ends)
    assert main(["convert", str(tiny), str(tmp_path / "out")]) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["absent/dora.gguf", "there/x"])
def test_a_missing_path_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["convert", name, "out"]) == 2
    assert f"{name}: no such file or folder" in capsys.readouterr().err


def test_degrees_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = resolve_model("tiny-random-llama", tmp_path / "home")
    for to, said in (("paddle", "possible are 1, 2, 4"), ("meta", "possible with --tensor_parallel_degree are 1, 2")):
        assert main(["convert", str(tiny), str(tmp_path / to), "--to", to, "--tensor_parallel_degree", "3"]) == 2
        assert said in capsys.readouterr().err
