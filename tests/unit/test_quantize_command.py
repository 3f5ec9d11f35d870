"""`arriero quantize`, and training on a base in few bits, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_with_tokenizer

import arriero
from arriero.cli import main
from arriero.data.calibration import read_blocks
from arriero.data.tokenizer import load_tokenizer
from arriero.errors import DataError
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.quantization.choice import scheme_for
from arriero.quantization.linear import dequantize_layers

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(CONFIG, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {n}th day, the king spoke to his men: go {n % 7} miles.\n" for n in range(300)))
    return path


def numbers(output: str, row: str) -> list[float]:
    """The two columns of a row of the table."""
    line = next(line for line in output.splitlines() if line.startswith(row))
    return [float(word) for word in line[len(row) :].split()]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("int4", "rtn"),
        ("weight_only_int8", "gptq"),
        ("int4", "awq"),
        ("nf4", "rtn"),
        ("a8w8", "rtn"),
        ("a8w8 static", "gptq"),
    ],
)
def test_quantize(base: Path, text: Path, tmp_path: Path, capsys: Any, kind: str, method: str) -> None:
    output = tmp_path / "q"
    kind, *static = kind.split()
    flags = [
        *(["--activation_scale", "static"] if static else []),
        "--quant_type",
        kind,
        "--quant_method",
        method,
        "--data_file",
        str(text),
        "--calibration_length",
        "64",
    ]
    assert main(["quantize", "--model_name_or_path", str(base), "--output_path", str(output), *flags]) == 0
    printed = capsys.readouterr().out
    before, after = numbers(printed, "weights (MB)")
    assert before == pytest.approx((base / "model.safetensors").stat().st_size / 1e6, abs=1e-4)
    assert after == pytest.approx((output / "model.safetensors").stat().st_size / 1e6, abs=1e-4)
    assert after < before
    blocks = read_blocks(text, load_tokenizer(base), 128, 64)
    expected = []
    for folder in (base, output):
        model, losses = hf.load_model(folder, dtype="float32"), []
        for block in blocks.held:
            with torch.no_grad():
                scores = model(block)[0, :-1].log_softmax(-1)
            losses.append(-scores.gather(1, block[0, 1:, None]))
        expected.append(float(torch.cat(losses).mean().exp()))
    assert numbers(printed, "perplexity") == pytest.approx(expected, rel=1e-4)
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    original, stored = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant_method", "gptq"], "--quant_method gptq calibrates on text: give --data_file"),
        (["--quant_type", "nf4", "--quant_method", "awq"], "--quant_type nf4 is none: give int8, int4"),
        (["--quant_type", "int3"], "quant_type"),
        (["--group_size", "0"], "--group_size is 0"),
        (["--activation_scale", "static"], "int8 rounds no inputs"),
        (["--activation_scale", "static", "--quant_type", "a8w8"], "finds ranges on text: give --data_file"),
        (["--quant_type", "int4", "--group_size", "48"], "48 does not divide"),
        (["--quant_type", "fp8", "--group_size", "32"], "fp8 has one scale for each output channel"),
        (["--quant_type", "nf4", "--group_size", "16"], "--group_size 16: bitsandbytes has nf4 in blocks of 32, 64, "),
        (["--quant_type", "nf4", "--group_size", "-1"], "--group_size -1: bitsandbytes has nf4 in blocks of 32, 64, "),
        (["--data_file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--data_file", "."], "--data_file .: is a folder: name a file of text or rows"),
        (["--tasks", "arc_easy"], "unknown option --tasks"),
        (["--include_path", "."], "unknown option --include_path"),
        (["--packing", "no"], "unknown option --packing"),
        (["--lora_path", "l1"], "by `arriero merge --lora_path ...`"),
        (["--calibration_length", "4"], "calibration_length"),
    ],
)
def test_refused(base: Path, tmp_path: Path, capsys: Any, flags: list[str], message: str) -> None:
    command = ["quantize", "--model_name_or_path", str(base), "--output_path", str(tmp_path / "q"), *flags]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--output_path", "{tmp}/file/q"], "--output_path {tmp}/file/q: cannot be written (Not a directory)"),
        (["--output_path", "{tmp}/file"], "--output_path {tmp}/file is a file: name a folder"),
        (["--output_path", "/proc/q"], "--output_path /proc/q: cannot be written"),
        (["--model_name_or_path", "{tmp}/adapter"], "join it with its base first, by `arriero merge --lora_path"),
    ],
)
def test_refused_before_the_model_is_loaded(
    base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("arriero.training.quantizing.load", loaded)
    (tmp_path / "file").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    given = {"--model_name_or_path": str(base), "--output_path": f"{tmp_path}/q"}
    given |= {flags[0]: flags[1].format(tmp=tmp_path)}
    assert main(["quantize", *(word for pair in given.items() for word in pair)]) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    names = {name.removeprefix("--"): value for name, value in given.items()}
    with pytest.raises(arriero.ArrieroError) as caught:
        arriero.quantize(names.pop("model_name_or_path"), **names)  # type: ignore[arg-type]
    assert message.format(tmp=tmp_path).removeprefix("--") in str(caught.value)  # as a keyword argument
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]


def test_the_other_name_of_the_output(base: Path, tmp_path: Path, capsys: Any) -> None:
    by_cli, by_python = tmp_path / "cli", tmp_path / "python"
    flags = ["--output_dir", str(by_cli), "--quant_type", "a8w8", "--max_new_tokens", "4"]
    assert main(["quantize", "--model_name_or_path", str(base), *flags]) == 0
    printed = capsys.readouterr()
    assert (
        "rtn: weights of 8 bits, a scale for each output channel, inputs of 8 bits, a scale for each token;"
        in printed.out
    )
    assert "--max_new_tokens has no effect without --dataset_path" in printed.err
    assert arriero.quantize(base, output_dir=by_python, quant_type="a8w8") == by_python
    assert (by_cli / "model.safetensors").read_bytes() == (by_python / "model.safetensors").read_bytes()
    with pytest.raises(arriero.ConfigError, match="output_dir and output_path are the same option"):
        arriero.quantize(base, tmp_path / "a", output_dir=tmp_path / "b")
    with pytest.raises(arriero.ConfigError, match="output_path must be given"):
        arriero.quantize(base)


def test_quantized_already_and_output_that_exists(base: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = str(tmp_path / "q"), str(tmp_path / "again")
    assert main(["quantize", "--model_name_or_path", str(base), "--output_path", first]) == 0
    assert main(["quantize", "--model_name_or_path", first, "--output_path", second]) == 2
    assert "its weights are quantized already" in capsys.readouterr().err
    assert main(["quantize", "--model_name_or_path", str(base), "--output_path", first]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", first, second, "--dtype", "bfloat16"]) == 0
    assert "dequantized" in capsys.readouterr().err
    original = load_file(base / "model.safetensors")
    for name, tensor in load_file(Path(second) / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), original[name], rtol=0.01, atol=0.01)


def test_text_blocks(base: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    ids = tokenizer.encode(text.read_text())
    blocks = read_blocks(text, tokenizer, 4, 100)
    count = len(ids) // 100
    assert torch.cat(blocks.held, 1)[0].tolist() == ids[(count - count // 10) * 100 : count * 100]
    assert len(blocks.calibration) == 4
    assert blocks.calibration[0][0].tolist() == ids[:100]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"src": f"what is {n} ?", "tgt": f"it is {n}"}) + "\n" for n in range(100)))
    found = torch.cat(read_blocks(rows, tokenizer, 1000, 20).calibration, 1)[0].tolist()
    first = tokenizer.decode(found[: found.index(CONFIG.eos_token_id)])  # type: ignore[arg-type]
    assert first.startswith("what is 0 ?")
    assert first.endswith("it is 0")
    with pytest.raises(DataError, match="tokens, at least 20000 are needed"):
        read_blocks(text, tokenizer, 4, 10000)


def test_conversations_calibrate_as_their_template_writes_them(base: Path, tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("system", "Be brief."),
            ("user", "First?"),
            ("assistant", "One."),
            ("user", "Second?"),
            ("assistant", "Two."),
        )
    ]
    rows, tokenizer = tmp_path / "chat.jsonl", load_tokenizer(base)
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    written = "<s>system: Be brief.\nuser: First?\nassistant: One.</s>\nuser: Second?\nassistant: Two.</s>"
    found = torch.cat(read_blocks(rows, tokenizer, 1000, 20).calibration, 1)[0].tolist()
    assert tokenizer.decode(found, skip_special_tokens=False).startswith(written * 2)


def train(base: Path, folder: Path, *flags: str) -> list[dict[str, Any]]:
    rows = [{"src": f"what follows {n} ?", "tgt": str(n + 1)} for n in range(12)]
    data = folder.parent / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["finetune", "--model_name_or_path", str(base), "--dataset_path", str(data), "--output_dir", str(folder)]
    command += ["--do_train", "--lora", "--max_steps", "4", "--learning_rate", "1e-2", "--disable_tqdm", "True"]
    command += ["--logging_steps", "1", "--report_to", "none", "--per_device_train_batch_size", "4", *flags]
    assert main(command) == 0
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("flags", [("--qlora",), ("--quantize_base", "int8")], ids=["nf4", "int8"])
def test_lora_on_a_quantized_base_is_lora_on_the_dequantized_one(
    base: Path, tmp_path: Path, flags: tuple[str, ...], capsys: Any
) -> None:
    """And on a folder that was quantized before, where the plain rule of the format did it."""
    found = train(base, tmp_path / "qlora", *flags)
    scheme = scheme_for("nf4" if flags == ("--qlora",) else "int8", CONFIG)
    model = hf.load_model(base, scheme=scheme)
    dequantize_layers(model)
    hf.save_model(model, CONFIG, tmp_path / "rounded", extra_files_from=base)
    expected = train(tmp_path / "rounded", tmp_path / "lora")
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("qlora", "lora")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [("--qlora",), ("--load_in_8bit",)], ids=["nf4", "int8"])
@pytest.mark.parametrize("granularity", ["full", "core_attn"])
def test_recomputation_on_a_quantized_base_changes_nothing(
    base: Path, tmp_path: Path, flags: tuple[str, ...], granularity: str
) -> None:
    expected = train(base, tmp_path / "kept", *flags)
    found = train(base, tmp_path / "again", *flags, "--recompute", "--recompute_granularity", granularity)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    kept, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def test_training_on_a_quantized_folder(base: Path, tmp_path: Path, capsys: Any) -> None:
    quantized = tmp_path / "q"
    assert (
        main(["quantize", "--model_name_or_path", str(base), "--output_path", str(quantized), "--quant_type", "nf4"])
        == 0
    )
    from_folder = train(quantized, tmp_path / "one", "--merge_weights")
    while_loading = train(base, tmp_path / "two", "--qlora", "--merge_weights")
    assert [line["loss"] for line in from_folder] == [line["loss"] for line in while_loading]
    merged = [load_file(tmp_path / name / "merged/model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
    capsys.readouterr()
    command = ["finetune", "--model_name_or_path", str(quantized), "--dataset_path", str(tmp_path / "train.jsonl")]
    assert main([*command, "--output_dir", str(tmp_path / "full"), "--do_train", "--max_steps", "1"]) == 2
    assert "quantized and cannot be trained by full fine-tuning: add --lora" in capsys.readouterr().err


def test_what_a_merge_does_not_round_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "the layers of the base round their inputs to 8 bits; the merged model does not"
    for kind, told in (("a8w8", True), ("int8", False)):
        quantized = tmp_path / kind
        assert main(["quantize", str(base), "--output_path", str(quantized), "--quant_type", kind]) == 0
        train(quantized, tmp_path / f"{kind}-run", "--merge_weights")
        assert (line in capsys.readouterr().out) == told


def test_quantize_base_needs_a_frozen_base(tmp_path: Path, capsys: Any) -> None:
    assert main(["finetune", "--qlora", "--output_dir", str(tmp_path / "run"), "--do_train"]) == 2
    assert "add --lora" in capsys.readouterr().err
    assert main(["finetune", "--lora", "--qlora", "--load_in_8bit", "--output_dir", str(tmp_path / "run")]) == 2
    assert "keep one of them" in capsys.readouterr().err


def test_rows_are_read_before_the_work(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"foo": "a"}\n')
    argv = ["quantize", str(base), "--output_path", str(tmp_path / "q")]
    for flag, name, message in (
        ("--dataset_path", "nowhere", "no such file or folder"),
        ("--dataset_path", "bad.jsonl", "bad.jsonl:1: none of the keys"),
        ("--data_file", "bad.jsonl", "bad.jsonl:1: none of the keys"),
    ):
        assert main([*argv, flag, str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "before" not in captured.out
        assert not (tmp_path / "q").exists()
