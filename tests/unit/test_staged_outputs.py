"""Outputs that are written beside their place: what a kill leaves, and what is told of a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import FormatError
from arriero.formats import hf
from arriero.formats.detection import detect
from arriero.formats.download import resolve_model
from arriero.formats.gguf.container import write_container
from arriero.formats.opening import MODEL_FILES, open_model
from arriero.formats.peft import PeftLoraConfig, load_adapter, save_adapter
from arriero.formats.staging import staged_file, staged_folder
from arriero.models.presets import TINY_RANDOM_LLAMA

Run = Callable[..., subprocess.CompletedProcess[str]]

KILLED = """
import os, signal, sys
from arriero.cli import main
import arriero.formats.conversion as conversion
conversion.compare = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main(["convert", sys.argv[1], sys.argv[2]])
"""


class Killed(BaseException):
    """In place of the kernel's signal, which no test survives."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def grow_old(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        os.utime(path, (time.time() - 60,) * 2)


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_the_next_conversion_removes_what_a_killed_one_left(tmp_path: Path, in_process: Run, name: str) -> None:
    source, output = str(resolve_model(TINY_RANDOM_LLAMA)), tmp_path / "there" / name
    done = subprocess.run([sys.executable, "-c", KILLED, source, str(output)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert len(names(output.parent)) == 1
    grow_old(output.parent)
    assert in_process("convert", source, str(output)).returncode == 0
    assert names(output.parent) == [name]


def test_so_does_a_writer_of_a_single_file_but_not_of_others_at_work(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with staged_file(tmp_path / "a.gguf") as place:
            place.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with staged_file(tmp_path / "a.gguf") as place, staged_file(tmp_path / "b.gguf") as other:
        place.write_bytes(b"of another process")
        other.write_bytes(b"b")
        grow_old(tmp_path)
        write_container(tmp_path / "a.gguf", {"general.architecture": "llama"}, [])
        assert place.read_bytes() == b"of another process"
        assert len(list(tmp_path.glob(".*.tmp"))) == 2  # the dead one's is gone
    assert names(tmp_path) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_is_written_through_a_link(tmp_path: Path, in_process: Run, exists: bool) -> None:
    source, real = str(resolve_model(TINY_RANDOM_LLAMA)), tmp_path / "disk" / "blob"
    real.parent.mkdir()
    if exists:
        real.write_bytes(b"old")
    link = tmp_path / "link.gguf"
    link.symlink_to(real)
    told = in_process("convert", source, str(link), "--overwrite_output_dir")
    assert told.returncode == 0, told.stderr
    assert link.is_symlink()
    assert real.read_bytes()[:4] == b"GGUF"
    assert (names(tmp_path), names(real.parent)) == (["disk", "link.gguf"], ["blob"])


@pytest.mark.parametrize("to", ["hf", "gguf", "paddle", "meta"])
def test_a_full_disk_names_the_output(
    tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("arriero.formats.chunk_writer.reserve", full)
    output = tmp_path / ("out.gguf" if to == "gguf" else "out")
    told = in_process("convert", str(resolve_model(TINY_RANDOM_LLAMA)), str(output), "--to", to)
    assert told.returncode == 2
    assert told.stderr.startswith(f"arriero: {output}")
    assert "the disk is full" in told.stderr
    assert ".tmp" not in told.stderr
    assert names(tmp_path) == []


def stops_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the n-th change of the destination be the last."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*given: Any, **more: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                raise Killed
            return real(*given, **more)

        return change

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("sharded", ["old", "new", "neither"])
def test_a_kill_while_publishing_never_leaves_a_mixture(tmp_path: Path, sharded: str) -> None:
    tiny = resolve_model(TINY_RANDOM_LLAMA)
    models = {}
    for which in ("old", "new"):
        model = hf.load_model(tiny)
        with torch.no_grad():
            model.model.norm.weight.add_(which == "new")
        size = "200KB" if which == sharded else "5GB"
        extra = {"tokenizer.json": (tiny / "tokenizer.json").read_bytes().rstrip() + b"\n" * (1 + (which == "new"))}
        hf.save_model(model, model.config, tmp_path / which, size, extra_files_from=tiny, extra_files=extra)
        models[which] = (model.model.norm.weight.clone(), extra["tokenizer.json"])
    seen = set()
    for step in range(1, 60):
        target = tmp_path / f"target{step}"
        shutil.copytree(tmp_path / "old", target)
        with pytest.MonkeyPatch.context() as patch:
            stops_at(patch, step)
            try:
                with staged_folder(target, replaces=MODEL_FILES) as staging:
                    shutil.copytree(tmp_path / "new", staging, dirs_exist_ok=True)
                finished = True
            except Killed:
                finished = False
        try:
            weight = hf.load_model(target).model.norm.weight
        except FormatError:
            seen.add("none")
        else:
            which = next(name for name, (norm, _) in models.items() if torch.equal(weight, norm))
            assert (target / "tokenizer.json").read_bytes() == models[which][1]
            seen.add(which)
        if finished:
            assert names(target) == names(tmp_path / "new")
            break
    assert seen == {"old", "none", "new"}


def test_nor_of_two_adapters(tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    for which, size in (("old", 1), ("new", 2)):
        state = {f"{layer}.lora_A.weight": torch.full((2, 8), float(size)), f"{layer}.lora_B.weight": torch.ones(8, 2)}
        save_adapter(tmp_path / which, state, PeftLoraConfig(r=2, lora_alpha=size, target_modules=("q_proj",)))
    for step in range(1, 20):
        target = tmp_path / f"target{step}"
        shutil.copytree(tmp_path / "old", target)
        with pytest.MonkeyPatch.context() as patch:
            stops_at(patch, step)
            try:
                with staged_folder(target) as staging:
                    shutil.copytree(tmp_path / "new", staging, dirs_exist_ok=True)
                break
            except Killed:
                pass
        try:
            config, state = load_adapter(target)
        except FormatError:
            continue
        assert float(state[f"{layer}.lora_A.weight"][0, 0]) == config.lora_alpha
    assert load_adapter(target)[0].lora_alpha == 2


def test_stale_files_of_another_format_do_not_win(tmp_path: Path, in_process: Run) -> None:
    """What convert replaces goes before what it writes comes."""
    tiny, output = resolve_model(TINY_RANDOM_LLAMA), tmp_path / "out"
    assert in_process("convert", str(tiny), str(output), "--to", "paddle").returncode == 0
    changed = tmp_path / "changed"
    shutil.copytree(tiny, changed)
    state = {name: tensor + 1 for name, tensor in load_file(changed / "model.safetensors").items()}
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    assert in_process("convert", str(changed), str(output), "--overwrite_output_dir").returncode == 0
    with open_model(detect(output)) as source:
        assert source.format == "hf"
    assert not list(output.glob("*.pdparams"))
