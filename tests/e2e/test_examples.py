"""Every file of examples/ runs and says what it should."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import arriero

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import save_byte_model
from served import Served

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = "__internal_testing__/tiny-random-llama"
Example = Callable[..., list[str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Example:
    """Runs one as a program of its own; returns its lines."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_generate(example: Example) -> None:
    lines = example("generate.py", TINY)
    model = arriero.load(TINY, device="cpu")
    assert model.chat("What is the capital of Peru?", max_new_tokens=24).splitlines()[0] in lines
    perplexity = next(line for line in lines if line.startswith("perplexity: "))
    assert float(perplexity.split()[1]) == pytest.approx(
        model.perplexity("The quick brown fox jumps over the lazy dog."), abs=0.1
    )
    logprobs = [float(line.split()[0]) for line in lines[-3:]]
    assert logprobs == sorted(logprobs, reverse=True)


def test_finetune_lora(example: Example, tmp_path: Path) -> None:
    lines = example("finetune_lora.py", TINY, str(tmp_path / "run"))
    told = next(line for line in lines if line.startswith("loss on held-out rows"))
    before, after = (float(word) for word in told.replace(",", "").split() if word[0].isdigit())
    assert after < before
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_evaluate(example: Example, tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text(json.dumps({"src": "The sky is", "tgt": "blue."}) + "\n")
    head, _, scores = example("evaluate.py", str(tmp_path), TINY)
    expected = arriero.evaluate(TINY, dataset_path=tmp_path, device="cpu")
    assert head.split() == ["model", *expected]
    assert [float(word) for word in scores.split()[1:]] == pytest.approx(list(expected.values()), abs=5e-3)
    with pytest.raises(SystemExit, match="nowhere"):
        example("evaluate.py", str(tmp_path), "./nowhere")


def test_convert_and_export(example: Example, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("gguf")
    folder, _ = save_byte_model(tmp_path / "model")
    lines = example("convert_and_export.py", str(folder), str(tmp_path / "made"))
    assert (tmp_path / "made/model.gguf").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "made/bf16/model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
    answer = arriero.load_bundle(tmp_path / "made/bundle").generate("The sky is", max_new_tokens=12)
    assert "\n".join(lines).endswith(answer.text)
    with pytest.raises(SystemExit, match="made/bf16 holds a model already"):
        example("convert_and_export.py", str(folder), str(tmp_path / "made"))
    for name in ("convert_and_export.py", "evaluate.py"):
        with pytest.raises(SystemExit, match=rf"usage: python .*{name} "):
            example(name)


def test_openai_client(example: Example) -> None:
    with Served() as server:
        lines = example("openai_client.py", server.api)
    answer = arriero.load(TINY, device="cpu").chat("What is the capital of Peru?", max_new_tokens=24)
    assert lines[0].endswith(answer.splitlines()[0])


def test_no_example_is_left_out() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
