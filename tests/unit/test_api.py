"""`import arriero`: its names, that it is light, and what it says of wrong arguments."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import arriero
from arriero.api.words import translated

ROOT = Path(__file__).parents[2]
TINY = "__internal_testing__/tiny-random-llama"


def python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_importing_costs_nothing() -> None:
    """Under 0.1 s: processor time, the least of five runs, so that a busy machine does not matter."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("import arriero").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.1


def test_no_name_imports_torch() -> None:
    script = (
        "import sys, arriero\n"
        "for name in arriero.__all__: getattr(arriero, name)\n"
        "assert set(arriero.__all__) <= set(dir(arriero))\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import arriero.export.bundle\n"
        "assert callable(arriero.export_model)\n"
    )
    result = python(script)
    assert result.returncode == 0, result.stderr


def test_type_checkers_see_the_names_there_are() -> None:
    tree = ast.parse((ROOT / "src/arriero/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == set(arriero._HOME_OF.items())
    assert {name for name, _ in seen} | {"__version__"} == set(arriero.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = arriero.lod  # type: ignore[attr-defined]


def test_every_name_is_explained() -> None:
    for name in set(arriero.__all__) - {"__version__"}:
        assert getattr(arriero, name).__doc__, name
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in arriero.__all__ if name not in page] == ["__version__"]


def test_the_types_of_keywords_are_those_of_the_options() -> None:
    spec = importlib.util.spec_from_file_location("make_keywords", ROOT / "docs/make_keywords.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.module(), "behind the options: run `make docs`"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arriero.load("no-such-model"), "no-such-model"),
        (lambda: arriero.load(TINY, devise="cpu"), "arriero.load: unknown key 'devise': did you mean device?"),  # type: ignore[call-arg]
        (lambda: arriero.load(TINY, dtype="int3"), "arriero.load(dtype=...) takes one of auto, float32"),  # type: ignore[arg-type]
        (lambda: arriero.load(TINY, batch_size=0), "batch_size is 0"),
        (lambda: arriero.load(TINY, adapter="nowhere"), "nowhere"),
        (lambda: arriero.load_bundle("nowhere"), "nowhere: is not a folder"),
        (lambda: arriero.evaluate(TINY, tasks=["arc"]), "arriero.evaluate takes no tasks"),  # type: ignore[call-arg]
        (lambda: arriero.evaluate(TINY), "dataset_path (files, or rows as a list of dicts) or data_name"),
        (
            lambda: arriero.finetune(TINY, output_dir="y"),
            "dataset_path (files, or rows as a list of dicts) or data_name",
        ),
        (lambda: arriero.finetune(TINY, dataset_path=None, output_dir="y"), "must be given"),
        (lambda: arriero.finetune(TINY, train_dataset=[]), "'train_dataset': it is called dataset_path here"),  # type: ignore[call-arg]
        (lambda: arriero.finetune(TINY, dataset_path="x"), "output_dir must be given: see help(arriero.finetune)"),
        (lambda: arriero.finetune(TINY, dataset_path=[3], output_dir="y"), "row 0 is int: a row is a dict"),  # type: ignore[list-item]
        (lambda: arriero.finetune(TINY, dataset_path=[{"src": {1}}], output_dir="y"), "row 0 is not JSON"),
        (lambda: arriero.finetune(TINY, dataset_path=[], output_dir="y"), "holds no row"),
        (lambda: arriero.finetune(TINY, dataset_path={"src": "a"}, output_dir="y"), "the splits are train, dev"),
        (lambda: arriero.load(None), "model is None: give a folder, a named model or a Hub id"),  # type: ignore[arg-type]
        (lambda: arriero.load(""), "model is empty"),
        (lambda: arriero.download(None), "model is None"),  # type: ignore[arg-type]
        (lambda: arriero.load(TINY, batch_size="8"), "batch_size is '8': it must be a whole number"),  # type: ignore[arg-type]
        (lambda: arriero.load(TINY, batch_size=True), "batch_size is True"),
        (lambda: arriero.load(TINY, adapter=""), "adapter is empty"),
        (lambda: arriero.load(TINY, adapter=3), "adapter is 3"),  # type: ignore[arg-type]
        (lambda: arriero.load_bundle(None), "folder is None"),  # type: ignore[arg-type]
        (
            lambda: arriero.finetune(TINY, dataset_path="x", output_dir="y", lora=True, prefix_tuning=True),
            "lora and prefix_tuning exclude each other",
        ),
        (
            lambda: arriero.finetune(TINY, dataset_path="x", output_dir="y", lora=True, lora_r=4, lora_rank=8),  # type: ignore[call-arg]
            "lora_rank and lora_r are the same option",
        ),
        (lambda: arriero.merge(TINY, "out", adapter="nowhere"), "nowhere"),
        (lambda: arriero.convert(TINY, "x.gguf", dtype="float16", gguf_type="q8_0"), "say two things"),
        (
            lambda: arriero.quantize(TINY, "out", quant_method="gptq"),
            "quant_method='gptq' calibrates on text: give data_file",
        ),
        (lambda: arriero.export_model(TINY, "out", format="torch", weights="int4"), "is for onnx, aoti and gguf"),
        (lambda: arriero.pretrain(TINY, output_dir="y"), "input_dir must be given"),
        (lambda: arriero.preprocess(), "must be given"),
    ],
)
def test_a_slip_is_one_line(call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(arriero.ArrieroError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--" not in re.sub(r"`[^`]*`", "", str(caught.value))  # but for commands
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "told", "here"),
    [
        ("load", "--device gpu: no GPU; say --device cpu", "device='cuda': no GPU; say device='cpu'"),
        ("load", "--lora_path nowhere: is gone", "adapter nowhere: is gone"),
        ("finetune", "--lora_path nowhere: is gone", "lora_path nowhere: is gone"),
        ("finetune", "--packing no pads, --lora_rank 8 is above", "packing=False pads, lora_rank=8 is above"),
        ("finetune", "--lora_rank is -4, or drop --lora.", "lora_rank is -4, or drop lora."),
        ("quantize", "join by `arriero merge --lora_path ...`", "join by `arriero merge --lora_path ...`"),
        ("finetune", "arriero export --output_path X writes it", "arriero export --output_path X writes it"),
        ("finetune", "pip install --no-deps x", "pip install --no-deps x"),
        ("merge", "--model_name_or_path takes text", "model takes text"),
        ("preprocess", "--model_name_or_path takes text", "model_name_or_path takes text"),
    ],
)
def test_messages_speak_of_keyword_arguments(function: str, told: str, here: str) -> None:
    assert translated(told, function) == here


def test_stop_has_both_its_names() -> None:
    for params in (
        arriero.SamplingParams(stop=["a", "b"]),
        replace(arriero.SamplingParams(stop=("a", "b")), seed=3),
        arriero.SamplingParams(stop_strings=("a", "b")),
    ):
        assert params.stop_strings == ("a", "b")
    assert arriero.SamplingParams(stop="ab").stop_strings == ("ab",)
    for wrong in ({"stop": 3}, {"stop": [""]}, {"stop": ["a"], "stop_strings": ["a"]}):
        with pytest.raises(arriero.GenerationError, match="stop"):
            arriero.SamplingParams(**wrong)  # type: ignore[arg-type]
