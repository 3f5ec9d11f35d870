"""`arriero inspect` as a user calls it: of every format, of parts of them, and of what is none."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arriero.cli import main
from arriero.commands.inspect import count_text, size_text
from arriero.formats.download import resolve_model
from arriero.formats.paddle.lora import write_paddle_lora
from arriero.formats.peft import PeftLoraConfig, save_adapter
from arriero.models.config import LlamaConfig

Look = Callable[..., str]
PARAMETERS, LAYERS, BYTES = 354_624, 2, 354_624 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in every format."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny = resolve_model("tiny-random-llama", folder / "home")
    tiny.rename(folder / "hf")
    for name, *more in (
        ("paddle", "--to", "paddle"),
        ("paddle-tp", "--to", "paddle", "--tensor_parallel_degree", "2"),
        ("meta", "--to", "meta", "--tensor_parallel_degree", "2"),
        ("shards", "--tensor_parallel_degree", "2"),
        ("x.gguf", "--gguf_type", "q8_0"),
    ):
        assert main(["convert", str(folder / "hf"), str(folder / name), "--verify", "no", *more]) == 0
    return folder


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Look:
    def call(path: Path, *more: str) -> str:
        capsys.readouterr()
        assert main(["inspect", str(path), *more]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Look:
    def call(path: Path) -> str:
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert len(captured.err) < 700
        return captured.err

    return call


@pytest.mark.parametrize(
    ("name", "what", "kinds"),
    [
        ("hf", "HF model folder", {"float32"}),
        ("paddle", "PaddleNLP model folder", {"float32"}),
        ("paddle-tp", "PaddleNLP model folder", {"float32"}),
        ("meta", "model folder of Meta's", {"float32"}),
        ("shards", "HF model folder with one weight file a process", {"float32"}),
        ("x.gguf", "GGUF model", {"Q8_0", "F32", "F16"}),
    ],
)
def test_a_model_of_each_format(folder: Path, look: Look, name: str, what: str, kinds: set[str]) -> None:
    facts = json.loads(look(folder / name, "--json", "--tensors"))
    assert facts["what"] == what
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == PARAMETERS
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert facts["layers"] == config["num_hidden_layers"] == LAYERS
    assert facts["hidden_size"] == config["hidden_size"]
    assert facts["intermediate_size"] == config["intermediate_size"]
    assert facts["attention"]["heads"] == config["num_attention_heads"]
    assert facts["attention"]["key_value_heads"] == config["num_key_value_heads"]
    assert facts["context"] == config["max_position_embeddings"]
    assert facts["vocabulary"] == config["vocab_size"]
    assert facts["rope"] == {"theta": 10000.0, "scaling": None}
    assert facts["tokenizer"]["kind"] == "byte-level BPE"
    assert facts["tokenizer"]["special"]["eos"] == {"id": 2, "text": "</s>"}
    assert facts["chat_template"] is True
    assert set(facts["dtypes"]) == kinds
    files = {tensor["file"] for tensor in facts["tensors"]}
    assert set(facts["files"]) == files
    root = folder / name if (folder / name).is_dir() else folder
    assert facts["bytes"] == sum((root / file).stat().st_size for file in files)
    assert sum(kind["tensors"] for kind in facts["dtypes"].values()) == len(facts["tensors"])


def test_a_bundle(folder: Path, tmp_path: Path, look: Look, refused: Look) -> None:
    bundle = tmp_path / "bundle"
    export = ["export", "--model_path", str(folder / "hf"), "--output_path", str(bundle), "--context", "300"]
    assert main([*export, "--weights", "int8"]) == 0
    found = json.loads(look(bundle, "--json"))
    facts = found["bundle"]
    assert found["what"] == "bundle of arriero export"
    assert found["parameters"] == PARAMETERS
    assert found["tokenizer"]["special"]["eos"] == {"id": 2, "text": "</s>"}
    assert (facts["kind"], facts["context"], facts["unusable"]) == ("onnx", 300, None)
    assert facts["weights"].startswith("int8, symmetric, blocks of 64; ")
    assert facts["made_with"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    manifest = json.loads((bundle / "manifest.json").read_text())
    lines = look(bundle)
    assert f"logits differ by at most {manifest['check']['largest_difference']:.1e} " in lines
    assert "runs here      yes" in lines
    size = sum(path.stat().st_size for path in bundle.iterdir()) - (bundle / "manifest.json").stat().st_size
    assert facts["bytes"] == size
    (bundle / "weights.bin").unlink()
    assert "runs here      no: " in look(bundle)
    assert "weights.bin: is missing" in look(bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"weights": "\x1b[2Jevil", "isa": "sparc"}))
    lines = look(bundle)
    assert "\x1b" not in lines
    assert "made for another processor" in lines
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"context": 10**400}))
    assert "sizes that cannot be" in refused(bundle)


def test_the_lines(folder: Path, look: Look) -> None:
    lines = look(folder / "hf").splitlines()
    assert lines[0] == str(folder / "hf")
    assert {line[2:].split("  ", 1)[0]: line[2:].split("  ", 1)[1].strip() for line in lines[1:]} == {
        "what": "HF model folder",
        "architecture": "llama",
        "parameters": "354,624 (355K)",
        "size": "1.42 MB in model.safetensors",
        "types": "float32  21 tensors  1.42 MB",
        "layers": "2, hidden size 64, feed-forward 176",
        "attention": "4 heads of 16, 2 key-value heads",
        "positions": "context of 2,048 tokens, RoPE theta 10,000",
        "vocabulary": "2,048 rows, head of its own",
        "tokenizer": "byte-level BPE, 2,048 tokens",
        "": lines[11].strip(),
        "chat template": "yes",
    }
    starts = {len(line) - len(line[2:].split("  ", 1)[1].lstrip()) for line in lines[1:] if line.startswith("  a")}
    assert len(starts) == 1  # a column
    assert "model.layers.1.mlp.up_proj.weight               176 x 64   float32  45.1 kB" in look(
        folder / "hf", "--tensors"
    )


@pytest.mark.parametrize("name", ["hf/model.safetensors", "paddle/model_state.pdparams", "meta/consolidated.00.pth"])
def test_a_file_of_tensors(folder: Path, look: Look, name: str) -> None:
    facts = json.loads(look(folder / name, "--json"))
    assert facts["what"] == "file of tensors"
    assert facts["dtypes"]["float32"]["tensors"] == 21


def test_a_headers_worth_is_read(tmp_path: Path, look: Look, folder: Path) -> None:
    """A folder of 40 GB on a disk that has no such file: holes, which would take minutes to read."""
    config = json.loads((folder / "hf" / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 2**21, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = {"up_proj": [2**21, 1024], "gate_proj": [2**21, 1024], "down_proj": [1024, 2**21]}
    header, at = {}, 0
    for layer in range(2):
        for name, size in shape.items():
            end = at + 2**31 * 4
            header[f"model.layers.{layer}.mlp.{name}.weight"] = {
                "dtype": "F32",
                "shape": size,
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 2**20
    assert "51.5 GB in model.safetensors" in look(tmp_path)


def test_adapters(tmp_path: Path, look: Look) -> None:
    state = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64),
        "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 4),
    }
    config = PeftLoraConfig(4, 8, target_modules=("q_proj",), use_rslora=True, base_model_name_or_path="some/base")
    save_adapter(tmp_path / "lora", state, config)
    lines = look(tmp_path / "lora")
    for line in ("what        PEFT LoRA adapter", "method      rank-stabilised LoRA", "rank        4, alpha 8"):
        assert f"  {line}\n" in lines
    assert "  layers      q_proj\n  base model  some/base\n  parameters  512\n" in lines


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"r": {"a": 1}}, "rank        not a number, alpha 8"),
        ({"lora_alpha": 10**400}, "rank        4, alpha too large a number"),
        ({"lora_alpha": float("nan")}, "rank        4, alpha not a number"),
        ({"r": None}, "rank        not given, alpha 8"),
        ({"target_modules": 5}, "layers      not a list of names"),
        ({"target_modules": {}}, "layers      not a list of names"),
        ({"base_model_name_or_path": ["x"]}, "base model  not a name"),
        ({"base_model_name_or_path": "a\x9b2Jb"}, "base model  a\\x9b2Jb"),
    ],
)
def test_adapters_with_strange_settings(tmp_path: Path, look: Look, changed: dict[str, object], line: str) -> None:
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | changed))
    assert f"  {line}\n" in look(tmp_path)
    text = look(tmp_path, "--json")
    assert all(character.isprintable() or character == "\n" for character in text)
    adapter = json.loads(text, parse_constant=pytest.fail)["adapter"]
    base = changed.get("base_model_name_or_path")
    assert not isinstance(base, str) or adapter["base"] == base


def test_a_prefix_without_tokens(tmp_path: Path, look: Look) -> None:
    save_file({"prompt_embeddings": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    assert "  prefix      number of tokens not given\n" in look(tmp_path)


def test_expressions_of_single_layers_become_one(folder: Path, tmp_path: Path, look: Look) -> None:
    """As PaddleNLP has them for an adapter of some of the layers."""
    config = LlamaConfig.from_file(folder / "hf")
    state = {f"model.layers.0.self_attn.{kind}_proj.lora_{part}.weight": torch.ones(shape) for kind in "qo"
             for part, shape in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    lora = PeftLoraConfig(4, 8, target_modules=("q_proj", "o_proj"))
    write_paddle_lora(tmp_path / "paddle", lora, state, config)
    assert "  layers      o_proj of layers 0, q_proj of layers 0\n" in look(tmp_path / "paddle")
    path = tmp_path / "paddle" / "lora_config.json"
    names = [f"llama\\.layers\\.{n}\\.self_attn\\.v_proj" for n in (10, 0, 1, 2, 5)] + [".*up_proj.*"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": names}))
    assert "  layers      up_proj, v_proj of layers 0-2 and 5 and 10\n" in look(tmp_path / "paddle")


def test_weights_of_another_model(folder: Path, tmp_path: Path, look: Look) -> None:
    for name in ("hf", "paddle", "shards"):
        shutil.copytree(folder / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        assert "do not fit" not in look(tmp_path / name)
        for changed in ({"intermediate_size": 128}, {"num_hidden_layers": 1}, {"num_hidden_layers": 9999}):
            path.write_text(json.dumps(json.loads((folder / name / "config.json").read_text()) | changed))
            line = next(line for line in look(tmp_path / name).splitlines() if "do not fit" in line)
            assert line.strip().startswith("weights do not fit config.json: ")
    assert "do not fit" not in look(folder / "x.gguf")


def test_a_tokenizer_with_strange_ids(folder: Path, tmp_path: Path, refused: Look) -> None:
    text = (folder / "hf" / "tokenizer.json").read_text()
    values = json.loads(text)
    values["added_tokens"][0]["id"] = 10**400
    for broken in (json.dumps(values), json.dumps(values).replace(str(10**400), "1e999")):
        (tmp_path / "tokenizer.json").write_text(broken)
        assert "is not a tokenizer of the tokenizers library" in refused(tmp_path)


def test_a_corpus_by_folder_prefix_and_file(tmp_path: Path, look: Look) -> None:
    np.save(tmp_path / "wiki_ids.npy", np.arange(10, dtype=np.uint16))
    np.savez(tmp_path / "wiki_idx.npz", lens=np.array([4, 6], dtype=np.int32))
    for path in (tmp_path, tmp_path / "wiki", tmp_path / "wiki_ids.npy"):
        assert "10 tokens, 2 documents, the longest 6, uint16" in look(path)


def test_runs_and_checkpoints(folder: Path, tmp_path: Path, look: Look, refused: Look) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.parent.mkdir()
    os.system(f"cp -r {folder / 'hf'} {checkpoint}")
    state = {"step": 20, "total_steps": 100, "tokens": 12345, "best_metric": 0.5}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text("{}")
    assert "training       step 20 of 100, 12,345 (12.3K) tokens, best metric 0.5" in look(checkpoint)
    assert "HF model folder of a checkpoint" in look(checkpoint)
    assert f"name a checkpoint: {checkpoint}" in refused(tmp_path / "run")
    for key, value in (("total_steps", [1]), ("best_metric", "bad"), ("step", True), ("tokens", 10**30)):
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | {key: value}))
        assert f"{key} must be a" in refused(checkpoint)
    (checkpoint / "trainer_state.json").write_text("[")
    assert "the checkpoint is damaged" in refused(checkpoint)


def test_a_model_that_is_not_read_here(folder: Path, tmp_path: Path, look: Look) -> None:
    save_file({"encoder.weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    lines = look(tmp_path)
    assert "architecture   BertModel" in lines
    assert "not supported  " in lines
    assert "bfloat16  1 tensor  24 B" in lines


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, look: Look) -> None:
    save_file({"a\x1b[2J\u202eb": torch.zeros(1)}, tmp_path / "model.safetensors")
    text = look(tmp_path / "model.safetensors", "--tensors")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "a\\x1b[2J\\u202eb" in text


def test_control_characters_in_a_refusal(tmp_path: Path, refused: Look) -> None:
    path = tmp_path / "a\x1b[2J\x9bb"
    assert "a\\x1b[2J\\x9bb" in refused(path)


HOSTILE = {
    "length.safetensors": struct.pack("<Q", 2**63) + b"{}",
    "empty.safetensors": b"",
    "deep.safetensors": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "counts.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
    "short.gguf": b"GGUF",
    "code.pdparams": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.",
    "code.pth": b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    "objects.npy": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(117)
    + b"\n",
    "huge.npy": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,), }".ljust(117)
    + b"\n",
    "pointer.gguf": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "some.bin": b"\x00" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, refused: Look, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    assert name in refused(tmp_path / name)


def test_hostile_folders(tmp_path: Path, refused: Look) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "'../secret.safetensors'" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    assert "'/etc/passwd'" in refused(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "b")
    assert "is a zip archive; unpack it" in refused(tmp_path / "x.zip")


def test_what_is_not_known_is_told_what_is(tmp_path: Path, refused: Look) -> None:
    (tmp_path / "config.yaml").write_text("lora: true\n")
    assert f"is a file of options for --config; to look at a run name its folder: {tmp_path}" in refused(
        tmp_path / "config.yaml"
    )
    (tmp_path / "notes.txt").write_text("hello")
    said = refused(tmp_path / "notes.txt")
    assert "read are folders of Hugging Face, PaddleNLP and Meta, GGUF files, adapters" in said
    assert "docs/" not in said


def test_numbers_in_words() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 45056, 999_600, 13_476_831_232)] == [
        *("0 B", "999 B", "1 kB", "45.1 kB", "1 MB", "13.5 GB"),
    ]
    assert [count_text(n) for n in (0, 999, 134_515_008, 6_738_415_616)] == [
        *("0", "999", "134,515,008 (135M)", "6,738,415,616 (6.74B)"),
    ]


def test_a_tokenizer_that_is_missing_is_said(folder: Path, tmp_path: Path, look: Look) -> None:
    copied = Path(shutil.copytree(folder / "hf", tmp_path / "copy"))
    assert "missing" not in look(copied)
    (copied / "tokenizer.json").unlink()
    assert "tokenizer missing: copy the tokenizer files of the base model there" in " ".join(look(copied).split())
