"""The base of an adapter: rounded as in its training, told where it is another one; a merge that is checked first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapter import IDS, logits_of, write_adapter
from safetensors.torch import load_file
from torch import Tensor

from arriero.adapters.lora import LoRAConfig, merge_lora
from arriero.adapters.peft_config import from_peft, to_peft
from arriero.cli import main
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.engine.export_source import export_source
from arriero.engine.loading import load_for_inference
from arriero.errors import FormatError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import BASE_QUANTIZATION, base_of_adapters, rounding
from arriero.formats.download import resolve_model
from arriero.formats.parts import Placement
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig
from arriero.quantization.choice import scheme_for
from arriero.quantization.linear import linear_layers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random-llama", tmp_path_factory.mktemp("home"))


def make_adapter(base: Path, folder: Path, *, kind: str | None = None, size: float = 0.1, name: str = "") -> Tensor:
    config = LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))
    return write_adapter(base, folder, config, kind=kind, size=size, name=name or str(base))


def test_a_rounded_base_is_rounded_again(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "a"
    expected = make_adapter(tiny, adapter, kind="int8")
    options, path = ModelOptions(model_name_or_path=str(tiny), device="cpu"), AdapterPathOptions(lora_path=str(adapter))
    with torch.no_grad():
        found = load_for_inference(options, path).model(IDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert f"base rounded to int8, as in the training of {adapter}" in capsys.readouterr().err
    with export_source(options, path) as source:
        assert isinstance(source, ModelSource)
        exported = {name: torch.as_tensor(tensor) for name, tensor in source.tensors.items()}
    merge = ["merge", "--model_name_or_path", str(tiny), "--lora_path", str(adapter), "--dtype", "float32"]
    assert main([*merge, "--output_path", str(tmp_path / "m")]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "m"), expected, atol=1e-5, rtol=0)
    for name, tensor in load_file(tmp_path / "m/model.safetensors").items():
        torch.testing.assert_close(exported[name], tensor, atol=1e-6, rtol=0)

    capsys.readouterr()
    (adapter / BASE_QUANTIZATION).unlink()  # the base as it is makes other numbers
    with torch.no_grad():
        assert float((load_for_inference(options, path).model(IDS) - expected).abs().max()) > 1e-4
    assert "rounded" not in capsys.readouterr().err
    (adapter / BASE_QUANTIZATION).write_text('{"quantize_base": "int3"}')
    with pytest.raises(FormatError, match="must be nf4 or int8, got 'int3'"):
        load_for_inference(options, path)


def test_a_plain_run_leaves_no_record(tiny: Path, tmp_path: Path) -> None:
    make_adapter(tiny, tmp_path / "a", kind="int8")
    assert (tmp_path / "a" / BASE_QUANTIZATION).is_file()
    make_adapter(tiny, tmp_path / "a")
    assert not (tmp_path / "a" / BASE_QUANTIZATION).exists()


def test_peft_loads_a_folder_with_the_record(tiny: Path, tmp_path: Path) -> None:
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    make_adapter(tiny, tmp_path / "a", kind="int8")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        with_record = library.PeftModel.from_pretrained(base, tmp_path / "a")(IDS).logits
        assert float((with_record - logits_of(tiny)).abs().max()) > 1e-3


def test_parts_of_a_rounded_base(tiny: Path) -> None:
    config = LlamaConfig.from_file(tiny)
    scheme, layers = scheme_for("int8", config), linear_layers(config)
    model = hf.load_model(tiny, torch.float32, scheme=scheme)
    values = rounding(hf.open_parts(tiny, config).read_part, scheme, layers)
    for name, shape in layers.items():
        whole = model.get_submodule(name).dequantized(torch.float32)  # type: ignore[operator]
        half = tuple(size // 2 for size in shape)
        found = values(f"{name}.weight", Placement(shape, half, half))
        torch.testing.assert_close(
            found.float(), whole[half[0] : 2 * half[0], half[1] : 2 * half[1]], atol=1e-6, rtol=0
        )
    name = "model.norm.weight"
    assert torch.equal(values(name, Placement.whole((config.hidden_size,))).float(), model.get_parameter(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_in_half_precision(dtype: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = getattr(torch, dtype)
    hf.save_model(hf.load_model(tiny), LlamaConfig.from_file(tiny), tmp_path / "b", dtype=dtype, extra_files_from=tiny)
    make_adapter(tmp_path / "b", tmp_path / "a", size=8.0)  # logits in half precision move by more than 2 %
    merge = ["merge", "--model_name_or_path", str(tmp_path / "b"), "--lora_path", str(tmp_path / "a")]
    assert main([*merge, "--output_path", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().out
    assert f"their sum rounded to {dtype}" in told
    assert "--dtype float32" in told
    base, found = load_file(tmp_path / "b/model.safetensors"), load_file(tmp_path / "m/model.safetensors")
    _, state = peft.load_adapter(tmp_path / "a")
    for name, tensor in base.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            tensor = tensor.float() + 2.0 * (state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"])
        assert torch.equal(found[name], tensor.to(kind)), name


def forget_a_layer(merge: Callable[..., Any]) -> Callable[..., Any]:
    def merged(model: Any, dtype: torch.dtype) -> Any:
        model.model.layers[0].self_attn.q_proj.lora_B.weight.data.zero_()
        return merge(model, dtype)

    return merged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_leaves_nothing(
    dtype: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tiny, tmp_path / "a", size=0.01)
    merge = ["merge", "--model_name_or_path", str(tiny), "--lora_path", str(tmp_path / "a"), "--dtype", dtype]
    with monkeypatch.context() as patch:
        patch.setattr("arriero.training.merging.merge_lora", forget_a_layer(merge_lora))
        assert main([*merge, "--output_path", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'm'}: model.layers.0.self_attn.q_proj.weight (1 of" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert main([*merge, "--output_path", str(tmp_path / "m")]) == 0


def test_another_base_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tiny, tmp_path / "a")
    model = hf.load_model(tiny)
    torch.nn.init.zeros_(model.model.norm.weight)
    hf.save_model(model, model.config, tmp_path / "other", extra_files_from=tiny)
    (tmp_path / "link").symlink_to(tiny)
    shutil.copytree(tiny, tmp_path / "copy")
    monkeypatch.chdir(tiny.parent)
    hub = tmp_path / "models--own--model/snapshots/0123"

    def told(named: str, given: str, folder: Path) -> list[str]:
        config, state = peft.load_adapter(tmp_path / "a")
        peft.save_adapter(tmp_path / "n", state, to_peft(from_peft(config), named))
        lines: list[str] = []
        assert base_of_adapters([str(tmp_path / "n")], given, folder, lines.append) is None
        return lines

    for named, given, folder in (
        (str(tiny), str(tiny), tiny),
        (str(tiny), tiny.name, Path(tiny.name)),
        (str(tiny), str(tmp_path / "link"), tmp_path / "link"),
        (str(tiny), str(tmp_path / "copy"), tmp_path / "copy"),
        ("__internal_testing__/tiny-random-llama", str(tiny), tiny),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path / "other"),
        ("/gone/other", str(tmp_path / "other"), tmp_path / "other"),
        ("Own/model", str(hub), hub),
    ):
        assert told(named, given, folder) == [], (named, given)
    for named in (str(tiny), "meta-llama/Llama-2-7b-hf", "smollm2-135m-instruct"):
        (line,) = told(named, "other", tmp_path / "other")
        assert f"{tmp_path / 'n'} was trained on {named} (adapter_config.json) and the base given is other" in line


def test_adapters_of_other_formats(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(tiny, tmp_path / "a")
    (tmp_path / "rows.jsonl").write_text('{"src": "a", "tgt": "b"}\n')
    for to, name, words in (("gguf", "x.gguf", "GGUF LoRA adapter"), ("paddle", "x", "PaddleNLP LoRA adapter")):
        other = tmp_path / name
        assert main(["convert", str(tmp_path / "a"), str(other), "--to", to]) == 0
        for verb in ("merge", "evaluate"):
            more = (
                ["--output_path", str(tmp_path / "m")]
                if verb == "merge"
                else ["--dataset_path", str(tmp_path / "rows.jsonl")]
            )
            capsys.readouterr()
            assert main([verb, "--model_name_or_path", str(tiny), "--lora_path", str(other), *more]) == 2
            error = capsys.readouterr().err
            assert f"{other}: is a {words}" in error
            assert f"`arriero convert {other} FOLDER`" in error
        assert main(["convert", str(other), str(tmp_path / f"{to}-back"), "--to", "hf"]) == 0
        assert peft.load_adapter(tmp_path / f"{to}-back")[0].r == 2
    with pytest.raises(FormatError, match=r"is a .* and no adapter"):
        peft.load_adapter(tiny)
    with pytest.raises(FormatError, match="an adapter folder needs it"):
        peft.load_adapter(tmp_path / "nowhere")


def test_training_goes_on_with_the_base_that_an_adapter_had(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tiny, tmp_path / "a", kind="int8", name="another/model")
    (tmp_path / "rows.jsonl").write_text('{"src": "one two", "tgt": "three"}\n' * 4)
    start = ["finetune", "--model_name_or_path", str(tiny), "--dataset_path", str(tmp_path / "rows.jsonl"), "--lora"]
    start += [
        "--lora_path",
        str(tmp_path / "a"),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(start) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a'} was trained on a base rounded to int8" in said
    assert "add --quantize_base int8" in said
    assert f"{tmp_path / 'a'} was trained on another/model" in said
    assert main([*start, "--quantize_base", "int8"]) == 0
    assert (tmp_path / "run" / BASE_QUANTIZATION).read_text() == (tmp_path / "a" / BASE_QUANTIZATION).read_text()


def test_a_prefix_keeps_the_record_too(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"src": "one two", "tgt": "three"}\n' * 4)
    start = [
        "finetune",
        "--model_name_or_path",
        str(tiny),
        "--dataset_path",
        str(tmp_path / "rows.jsonl"),
        "--max_steps",
        "1",
    ]
    start += ["--prefix_tuning", "--quantize_base", "int8", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(start) == 0
    assert (tmp_path / "run" / BASE_QUANTIZATION).is_file()
