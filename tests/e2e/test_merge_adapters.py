"""`arriero merge` of adapters: each kind, several by weights, into a model or into one adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from random_adapter import IDS, logits_of, write_adapter
from safetensors.torch import load_file, save_file

from arriero.adapters.lora import LoRAConfig, apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.cli import main
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.export_source import export_source
from arriero.engine.loading import load_for_inference
from arriero.formats import hf, peft
from arriero.formats.download import resolve_model
from arriero.formats.source import ModelSource

TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random-llama", tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("kind", ["use_dora", "pissa"])
def test_each_kind(kind: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoRAConfig(rank=2, alpha=4.0, target_modules=TARGETS, **{kind: True})  # type: ignore[arg-type]
    expected = write_adapter(tiny, tmp_path / "a", config, seed=1)
    arguments = ["--lora_path", str(tmp_path / "a"), "--output_path", str(tmp_path / "m"), "--dtype", "float32"]
    assert main(["merge", "--model_name_or_path", str(tiny), *arguments]) == 0
    assert "logits differ from base + adapter by at most" in capsys.readouterr().out
    assert float((logits_of(tmp_path / "m") - expected).abs().max()) <= 1e-5
    assert float((logits_of(tiny) - expected).abs().max()) > 1e-3


def test_several_by_weights(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tiny, tmp_path / "a", LoRAConfig(rank=2, alpha=4.0, target_modules=TARGETS), seed=1)
    write_adapter(tiny, tmp_path / "b", LoRAConfig(rank=3, use_rslora=True, target_modules=("q_proj",)), seed=2)
    base = load_file(tiny / "model.safetensors")
    expected = {name: tensor.float() for name, tensor in base.items()}
    for folder, weight in (("a", 0.7), ("b", 0.3)):  # the sum, written out
        config, state = peft.load_adapter(tmp_path / folder)
        for name in state:
            layer = name.partition(".lora_A")[0]
            if layer != name:
                delta = state[f"{layer}.lora_B.weight"] @ state[name] * from_peft(config).scaling
                expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + weight * delta
    both = ["--lora_path", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--adapter_weights", "0.7,0.3", "--dtype", "float32"]
    merge = ["merge", "--model_name_or_path", str(tiny), *both]
    assert main([*merge, "--output_path", str(tmp_path / "m")]) == 0
    assert f"0.3 x {tmp_path / 'b'}" in capsys.readouterr().out
    found = load_file(tmp_path / "m/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    assert main([*merge, "--output_path", str(tmp_path / "j"), "--output_kind", "adapter"]) == 0
    assert json.loads((tmp_path / "j/adapter_config.json").read_text())["r"] == 5
    config, state = peft.load_adapter(tmp_path / "j")
    model = hf.load_model(tiny, torch.float32)
    apply_lora(model, from_peft(config), fresh=False)
    load_adapter_state(model, state)
    with torch.no_grad():
        assert float((model(IDS) - logits_of(tmp_path / "m")).abs().max()) <= 1e-5


def test_a_quantized_base_is_dequantized(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from arriero.formats.quantized import file_state, with_scheme
    from arriero.quantization.integers import IntegerScheme
    from arriero.quantization.schemes import IntegerWeights

    scheme = IntegerWeights(IntegerScheme(8, None))
    small = hf.load_model(tiny, torch.float32, scheme=scheme)
    config = with_scheme(small.config, scheme)
    hf.save_model(file_state(small, torch.float32), config, tmp_path / "int8", extra_files_from=tiny)
    adapter = LoRAConfig(rank=2, alpha=4.0, target_modules=TARGETS)
    expected = write_adapter(tmp_path / "int8", tmp_path / "a", adapter, seed=1)
    arguments = ["--lora_path", str(tmp_path / "a"), "--output_path", str(tmp_path / "m"), "--dtype", "float32"]
    assert main(["merge", "--model_name_or_path", str(tmp_path / "int8"), *arguments]) == 0
    assert "warning: the base is quantized" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    assert {tensor.dtype for tensor in load_file(tmp_path / "m/model.safetensors").values()} == {torch.float32}
    assert float((logits_of(tmp_path / "m") - expected).abs().max()) <= 1e-5


def test_refusals(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tiny, tmp_path / "a", LoRAConfig(rank=2, target_modules=TARGETS), seed=1)
    write_adapter(tiny, tmp_path / "d", LoRAConfig(rank=2, target_modules=TARGETS, use_dora=True), seed=1)
    cases = [
        (f"{tmp_path / 'a'},{tmp_path / 'd'}", [], "DoRA"),
        (f"{tmp_path / 'a'},{tmp_path / 'a'}", ["--adapter_weights", "1"], "1 numbers for 2"),
        (f"{tmp_path / 'a'},nowhere", [], "nowhere"),
        (f"{tmp_path / 'a'},", [], "a folder is missing beside a comma"),
        (f"{tmp_path / 'a'}, ,{tmp_path / 'a'}", [], "a folder is missing beside a comma"),
        (str(tmp_path / "a"), ["--output_kind", "adapter"], "joins several adapters"),
    ]
    for path, more, words in cases:
        out = ["--lora_path", path, "--output_path", str(tmp_path / "out"), *more]
        assert main(["merge", "--model_name_or_path", str(tiny), *out]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_head_of_a_tied_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "a", tmp_path / "m"
    shutil.copytree(tiny, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(base / "model.safetensors")
    save_file({name: weights[name] for name in weights if name != "lm_head.weight"}, base / "model.safetensors")
    expected = write_adapter(base, adapter, LoRAConfig(rank=2, target_modules=("q_proj", "lm_head")), seed=1)
    assert float((logits_of(base) - expected).abs().max()) > 1e-3
    arguments = ["--lora_path", str(adapter), "--output_path", str(merged), "--dtype", "float32"]
    assert main(["merge", "--model_name_or_path", str(base), *arguments]) == 0
    assert "logits differ from base + adapter by at most" in capsys.readouterr().out
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(merged / "model.safetensors")
    paths = AdapterPathOptions(lora_path=str(adapter))
    loaded = load_for_inference(ModelOptions(model_name_or_path=str(base), device="cpu"), paths)
    with torch.no_grad():
        for found in (logits_of(merged), loaded.model(IDS)):
            assert float((found - expected).abs().max()) <= 1e-5
    written = load_file(merged / "model.safetensors")
    with export_source(ModelOptions(model_name_or_path=str(base)), paths) as source:
        assert isinstance(source, ModelSource)
        assert source.config.tie_word_embeddings is False
        assert source.tensors.keys() == written.keys()
        for name, tensor in source.tensors.items():
            assert isinstance(tensor, torch.Tensor)
            torch.testing.assert_close(tensor, written[name])


def test_the_loss_of_a_head_whose_adapter_stays_apart(tiny: Path, tmp_path: Path) -> None:
    """A quantized base cannot be merged with in memory; `merge` dequantizes it."""
    rounded, adapter, merged = tmp_path / "q", tmp_path / "a", tmp_path / "m"
    assert main(["quantize", "--model_name_or_path", str(tiny), "--output_path", str(rounded)]) == 0
    write_adapter(tiny, adapter, LoRAConfig(rank=2, target_modules=("q_proj", "lm_head")), seed=1)
    given = ["--model_name_or_path", str(rounded), "--lora_path", str(adapter)]
    assert main(["merge", *given, "--output_path", str(merged), "--dtype", "float32"]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("To be, or not to be", "that is the question"))
    )
    losses = []
    for model in (["--model_name_or_path", str(merged)], given, given[:2]):
        arguments = [*model, "--dataset_path", str(rows), "--output_dir", str(tmp_path / f"e{len(losses)}")]
        assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
        losses.append(json.loads((tmp_path / f"e{len(losses)}/eval_results.json").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert abs(losses[2] - losses[0]) > 1e-3  # the adapter matters
