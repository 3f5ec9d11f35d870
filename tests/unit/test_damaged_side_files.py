"""Damaged files beside the weights, and odd values in them: one clear line and exit code 2, never an internal error."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.formats.download import resolve_model
from arriero.formats.peft import PeftLoraConfig, save_adapter
from arriero.models.presets import TINY_RANDOM_LLAMA

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(TINY_RANDOM_LLAMA), folder)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(told: subprocess.CompletedProcess[str], *words: str) -> None:
    assert told.returncode == 2, told.stderr
    assert told.stderr.count("\n") == 1
    assert "internal error" not in told.stderr
    assert all(word in told.stderr for word in words), told.stderr


@pytest.mark.parametrize("to", ["hf", "gguf", "paddle", "meta"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_half_a_surrogate_pair(tmp_path: Path, model: Path, in_process: Run, name: str, to: str) -> None:
    edit(model / name, lambda values: values.update(note="a\ud800b"))
    if name == "tokenizer_config.json":  # its content is written anew where templates have names
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        (model / "chat_template.jinja").write_text("{{ messages }}")
    output = tmp_path / ("out.gguf" if to == "gguf" else "out")
    refused(in_process("convert", str(model), str(output), "--to", to), name, "surrogate")
    assert not output.exists()


def test_half_a_surrogate_pair_of_an_adapter(tmp_path: Path, in_process: Run) -> None:
    import torch

    layer = "model.layers.0.self_attn.q_proj"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_adapter(tmp_path / "a", state, PeftLoraConfig(r=2, target_modules=("q_proj",)))
    edit(tmp_path / "a" / "adapter_config.json", lambda values: values.update(revision="\udfff"))
    told = in_process("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "float16")
    refused(told, "adapter_config.json", "surrogate")


@pytest.mark.parametrize("first", ["<s>", None, 1, [], {"SpecialToken": "x"}, {"SpecialToken": {"id": ["x"]}}])
def test_a_broken_template_of_a_post_processor(tmp_path: Path, model: Path, in_process: Run, first: Any) -> None:
    step = {"type": "TemplateProcessing", "single": [first], "pair": [], "special_tokens": {}}
    edit(model / "tokenizer.json", lambda values: values.update(post_processor=step))
    told = in_process("convert", str(model), str(tmp_path / "out.gguf"))
    refused(told, "tokenizer.json", "post_processor")


def npy(version: tuple[int, int], header: bytes) -> bytes:
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x01\x00\x10",
        b"\x93NUMPY\x02\x00\x10\x00",
        npy((1, 0), b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,"),
        npy((1, 0), b"'''"),
        npy((1, 0), b"{'descr': '<f4', 'shape': ((((\n"),
        npy((2, 0), b"\xff\xfe"),
        npy((1, 0), b"{'descr': ('<f4', (1, 10**30)), 'fortran_order': False, 'shape': ()}\n"),
        npy((1, 0), b"{'descr': {'a': 1}, 'fortran_order': False, 'shape': ()}\n"),
    ],
)
def test_a_header_of_numpy(tmp_path: Path, in_process: Run, content: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    refused(in_process("inspect", str(path)), "a.npy")


def test_every_cut_and_flip_of_a_header_is_one_line(tmp_path: Path, in_process: Run) -> None:
    np.save(tmp_path / "good.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    content = (tmp_path / "good.npy").read_bytes()
    generator, path = np.random.default_rng(0), tmp_path / "bad.npy"
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(0, 80, 2):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(bytes(damaged)[: generator.integers(1, len(content) + 1)])
        told = in_process("inspect", str(path))
        assert told.returncode in (0, 2), told.stderr


def test_a_prefix_that_is_too_long_for_names_of_files(tmp_path: Path, in_process: Run) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    options = ["--input_path", str(tmp_path / "a.jsonl"), "--model_name_or_path", TINY_RANDOM_LLAMA]
    refused(
        in_process("preprocess", *options, "--output_prefix", str(tmp_path / ("é" * 125))), "--output_prefix", "250"
    )
    assert in_process("preprocess", *options, "--output_prefix", str(tmp_path / ("x" * 200))).returncode == 0


@pytest.mark.parametrize("value", ["\x1b[31mred\x1b[0m" * 100, 0.1])
def test_a_warning_is_told_once_and_steers_no_terminal(
    tmp_path: Path, model: Path, in_process: Run, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    edit(model / "config.json", lambda values: values.update(attention_dropout=value))
    assert in_process("convert", str(model), str(tmp_path / "out"), "--dtype", "bfloat16").returncode == 0
    (line,) = [record.getMessage() for record in caplog.records if "attention_dropout" in record.getMessage()]
    assert line.isprintable()
    assert len(line) < len(str(model)) + 120
    assert line.startswith(str(model))
