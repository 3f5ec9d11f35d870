"""HF folders with `.bin` weights, as transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.bin_folder import open_bin_folder
from arriero.formats.hf import save_model
from arriero.formats.safe_tensors import weight_files
from arriero.models.config import LlamaConfig

transformers = pytest.importorskip("transformers")

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def folder_of(path: Path, **changes: Any) -> dict[str, Tensor]:
    """Write config.json and a tokenizer file; the weights of the model that transformers makes of it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "tokenizer.json").write_text("{}")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(path))
    return dict(model.state_dict())


def shard(folder: Path, state: dict[str, Tensor]) -> None:
    names = list(state)
    files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, own in files.items():
        torch.save({name: state[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_logits_are_those_of_transformers(sharded: bool, tied: bool, tmp_path: Path) -> None:
    state = folder_of(tmp_path / "bin", tie_word_embeddings=tied)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old checkpoints have
    if sharded:
        shard(tmp_path / "bin", state)
    else:
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    with open_bin_folder(tmp_path / "bin") as source:
        assert source.files == {"tokenizer.json": b"{}"}
        assert set(source.tensors) == {
            name for name in state if "inv_freq" not in name and not (tied and name == "lm_head.weight")
        }
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.tensors.items())
        save_model(source.tensors, source.config, tmp_path / "safe")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("safe", "bin")
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_understood(prefix: str, tmp_path: Path) -> None:
    state = folder_of(tmp_path / "bin")
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "bin" / "pytorch_model.bin")
    with open_bin_folder(tmp_path / "bin") as source:
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.tensors.items())


def test_names_of_the_bare_decoder_are_understood(tmp_path: Path) -> None:
    state = folder_of(tmp_path / "bin")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(bare, tmp_path / "bin" / "pytorch_model.bin")
    with open_bin_folder(tmp_path / "bin") as source:
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.tensors.items())
    del bare["lm_head.weight"]
    torch.save(bare, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"missing lm_head\.weight"):
        open_bin_folder(tmp_path / "bin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.bin", "only plain .bin names"),
        ("/etc/passwd", "only plain .bin names"),
        ("model.safetensors", "only plain .bin names"),
        ("gone.bin", "'gone.bin', which is missing"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(name: str, message: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=message):
        open_bin_folder(tmp_path / "bin")


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = folder_of(tmp_path / "bin")
    with pytest.raises(FormatError, match=r"holds neither pytorch_model\.bin"):
        open_bin_folder(tmp_path / "bin")
    torch.save(state | {"model.norm.weight": torch.ones(33)}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"model\.norm\.weight has the shape \[33\]"):
        open_bin_folder(tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    shard(tmp_path / "bin", state)
    torch.save(state, tmp_path / "bin" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(FormatError, match="which another file holds too"):
        open_bin_folder(tmp_path / "bin")


def test_a_folder_of_bin_weights_is_told_how_to_be_converted(tmp_path: Path) -> None:
    torch.save(folder_of(tmp_path / "bin"), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*arriero convert"):
        weight_files(tmp_path / "bin")
    assert LlamaConfig.from_file(tmp_path / "bin").vocab_size == 40
