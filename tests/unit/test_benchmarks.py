"""The programs of benchmarks/, which nothing else runs: that they still fit the code, and that one on GPUs goes through."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "tests" / "fixtures"))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_it_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(name, monkeypatch).__doc__


@pytest.mark.parametrize("case", ["O1+compile", "O2+recompute", "O2+recompute+lora", "O2+fp8+compile"])
def test_pretraining_on_a_gpu_goes_through_on_a_cpu(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.jsonl"
    given = ["--device", "cpu", "--tiny", "--warmup", "1", "--steps", "2", "--backend", "aot_eager", "--here"]
    program = load("gpu_pretrain", monkeypatch)
    assert program.main([*given, "--cases", case, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert capsys.readouterr().out.count("|") == program.HEADING.splitlines()[0].count("|")
    assert len(found["losses"]) == 3
    assert found["losses"][0] == pytest.approx(5.545, abs=0.3)  # ln(256): nothing is learned of noise
