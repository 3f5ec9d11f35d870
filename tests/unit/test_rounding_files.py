"""The files that say how weights are rounded stay with a model or adapter, or a line says that they are left out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arriero.formats.download import resolve_model
from arriero.formats.peft import PeftLoraConfig, save_adapter
from arriero.formats.side_files import ROUNDING_FILES
from arriero.formats.upload import collect
from arriero.models.config import LlamaConfig
from arriero.models.presets import TINY_RANDOM_LLAMA

Run = Callable[..., subprocess.CompletedProcess[str]]
CONTENT = {
    "qat.json": b'{"kind": "A8W8"}\n',
    "qat.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "base_quantization.json": b'{"quantize_base": "nf4"}\n',
}


def test_these_are_all() -> None:
    assert set(ROUNDING_FILES) == set(CONTENT)


def folder_of(tmp_path: Path, kind: str) -> Path:
    base, folder = resolve_model(TINY_RANDOM_LLAMA), tmp_path / kind
    if kind == "model":
        shutil.copytree(base, folder)
    else:
        config = LlamaConfig.from_file(base)
        width, layer = config.hidden_size, "model.layers.0.self_attn.q_proj"
        out = config.num_attention_heads * config.head_dim
        state = {f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(out, 2)}
        save_adapter(folder, state, PeftLoraConfig(r=2, target_modules=("q_proj",), base_model_name_or_path=str(base)))
    for name in ("qat.json", "qat.safetensors") if kind == "model" else CONTENT:
        (folder / name).write_bytes(CONTENT[name])
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("model", ["--dtype", "bfloat16"]),
        ("model", ["--tensor_parallel_degree", "2"]),
        ("adapter", ["--dtype", "bfloat16"]),
    ],
)
def test_folders_keep_them_and_old_ones_go(tmp_path: Path, in_process: Run, kind: str, options: list[str]) -> None:
    source, output = folder_of(tmp_path, kind), tmp_path / "out"
    told = in_process("convert", str(source), str(output), *options)
    assert told.returncode == 0, told.stderr
    kept = {name: (output / name).read_bytes() for name in CONTENT if (output / name).exists()}
    assert kept == {name: CONTENT[name] for name in CONTENT if (source / name).exists()}
    assert "left out" not in told.stderr
    for name in kept:
        (source / name).unlink()
    told = in_process("convert", str(source), str(output), *options, "--overwrite_output_dir")
    assert told.returncode == 0, told.stderr
    assert not any((output / name).exists() for name in CONTENT)


@pytest.mark.parametrize("to", ["gguf", "paddle", "meta"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_one_line_says_that_a_format_has_no_place_for_them(tmp_path: Path, in_process: Run, kind: str, to: str) -> None:
    if (kind, to) == ("adapter", "meta"):
        pytest.skip("Meta's format has no adapters")
    source, output = folder_of(tmp_path, kind), tmp_path / ("out.gguf" if to == "gguf" else "out")
    told = in_process("convert", str(source), str(output), "--to", to)
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stderr.splitlines() if "left out" in line]
    assert "warning: " in line
    assert all(name in line for name in CONTENT if (source / name).exists())
    if output.is_dir():
        assert not any((output / name).exists() for name in CONTENT)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_they_are_uploaded(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, kind)
    assert {name for name in CONTENT if (folder / name).exists()} <= collect(folder).files.keys()
