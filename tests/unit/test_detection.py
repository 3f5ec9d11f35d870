"""Telling what a file or folder is from names and first bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arriero.errors import FormatError
from arriero.formats.detection import MODELS, NAMES, detect
from arriero.formats.opening import open_model

WEIGHTS = {"model.layers.0.input_layernorm.weight": torch.ones(4)}


def touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


def adapter(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))

    return make


def safetensors(names: dict[str, torch.Tensor], file: str = "model.safetensors") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_file(names, folder / file)
        (folder / "config.json").write_text("{}")

    return make


PADDLE = {"llama.layers.0.input_layernorm.weight": torch.ones(4)}
FOLDERS: list[tuple[str, Callable[[Path], None]]] = [
    ("hf", safetensors(WEIGHTS)),
    ("hf", touch("config.json", "model.safetensors.index.json", "tokenizer.json")),
    ("hf-shards", touch("config.json", "model-tp00-of-02.safetensors", "model-tp01-of-02.safetensors")),
    ("hf-bin", touch("config.json", "pytorch_model.bin")),
    ("hf-bin", touch("config.json", "pytorch_model.bin.index.json")),
    ("paddle", touch("config.json", "model_state.pdparams")),
    ("paddle", touch("config.json", "model_state.tp00.pdparams", "model_state.tp01.pdparams")),
    ("paddle", touch("config.json", "model_state.tp00_pp00.pdparams")),
    ("paddle", touch("config.json", "model_state.pdparams.index.json")),
    ("paddle", safetensors(PADDLE)),
    ("meta", touch("params.json", "consolidated.00.pth", "tokenizer.model")),
    ("meta", touch("params.json", "consolidated.00.pth", "config.json", "tokenizer.json")),
    ("peft-lora", adapter("LORA")),
    ("peft-prefix", adapter("PREFIX_TUNING")),
    ("paddle-lora", touch("lora_config.json", "lora_model_state.pdparams")),
    ("paddle-lora", touch("lora_config.json", "lora_model_state.tp00.pdparams", "lora_model_state.tp01.pdparams")),
    ("paddle-prefix", touch("prefix_config.json", "prefix_model_state.pdparams")),
    ("paddle-prefix", touch("prefix_config.json", "pre_caches.npy")),
    ("tokenizer", touch("tokenizer.json", "tokenizer_config.json")),
    ("tokenizer", touch("sentencepiece.bpe.model")),
    ("corpus", touch("wiki_ids.npy", "wiki_idx.npz")),
    ("corpus", touch("wiki.bin", "wiki.idx")),
]


@pytest.mark.parametrize(("kind", "make"), FOLDERS)
def test_folders(tmp_path: Path, kind: str, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    found = detect(tmp_path)
    assert (found.kind, found.part_of, found.path) == (kind, None, tmp_path)
    assert found.name == NAMES[found.kind]


def test_what_training_leaves(tmp_path: Path) -> None:
    touch("model.safetensors", "config.json", "train_log.jsonl", "checkpoint-5/manifest.json")(tmp_path)
    touch("trainer_state.json", "model.safetensors", "config.json")(tmp_path / "checkpoint-5")
    assert detect(tmp_path).part_of == "run"
    assert detect(tmp_path / "checkpoint-5").part_of == "checkpoint"
    assert detect(tmp_path / "checkpoint-5").name == "HF model folder of a checkpoint"


WRONG: list[tuple[str, Callable[[Path], None]]] = [
    ("is empty", touch()),
    ("name a checkpoint: .*checkpoint-20", touch("checkpoint-20/x", "checkpoint-3/x", "train_log.jsonl")),
    (r"holds GGUF files \(2 files\); name one: .*a\.gguf", touch("a.gguf", "b.gguf")),
    ("is a diffusion pipeline", touch("model_index.json")),
    ("has weights of Meta's but no params.json", touch("consolidated.00.pth")),
    ("TensorFlow, Flax, Rust or ONNX", touch("config.json", "tf_model.h5")),
    (r"checkpoint of distributed training", touch("__0_0.distcp", ".metadata")),
    (r"has model-00001-of-00002.safetensors, but no", touch("config.json", "model-00001-of-00002.safetensors")),
    ("has a config.json but no weights", touch("config.json")),
    ("lora_model_state.pdparams is missing", touch("lora_config.json")),
    ("prefix_config.json is missing", touch("pre_caches.npy")),
    ("peft_type 'IA3' is not read", adapter("IA3")),
    (r"it holds a\.txt, b\.txt, c\.txt and 1 more", touch("a.txt", "b.txt", "c.txt", "d.txt")),
]


@pytest.mark.parametrize(("message", "make"), WRONG)
def test_wrong_folders(tmp_path: Path, message: str, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    with pytest.raises(FormatError, match=message):
        detect(tmp_path)


FILES = [
    ("x.gguf", b"", "is empty"),
    ("model.safetensors", (20).to_bytes(8, "little") + b'{"a":1}' + b" " * 50, "holds tensors .*name its folder"),
    ("model_state.pdparams", b"\x80\x04\x95", "holds weights of Paddle; name its folder"),
    ("x.pdopt", b"\x80\x04\x95", "state of a Paddle optimizer; it is never opened"),
    ("x.pkl", b"\x80\x04\x95", "is a pickle; it is never opened"),
    ("consolidated.00.pth", b"PK\x03\x04", "holds weights of torch.save; name its folder"),
    ("x.zip", b"PK\x03\x04", "is a zip archive; unpack it"),
    ("x.tar.gz", b"\x1f\x8b\x08", "is compressed; unpack it"),
    ("config.json", b"{}", "is JSON; name its folder"),
    ("rows.jsonl", b'{"src": "a"}', "is a file of rows, not of a model; .*--dataset_path"),
    ("rows.json", b'[{"src": "a"}]', "is a file of rows"),
    ("rows.csv", b"src,tgt", "is a file of rows"),
    ("pre_caches.npy", b"\x93NUMPY\x01\x00", "is a prefix of PaddleNLP; name its folder"),
    ("x_ids.npy", b"\x93NUMPY\x01\x00", "named by its prefix"),
    ("x.idx", b"MMIDIDX\x00\x00", "without .idx"),
    ("model.gguf", b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    ("readme", b"hello", "is no model, adapter or corpus"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        detect(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        detect(tmp_path / "nowhere")


def test_only_models_are_opened(tmp_path: Path) -> None:
    adapter("LORA")(tmp_path)
    with pytest.raises(FormatError, match="is a PEFT LoRA adapter, and a model is needed"):
        open_model(detect(tmp_path))
    assert "peft-lora" not in MODELS
