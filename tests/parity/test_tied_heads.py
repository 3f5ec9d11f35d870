"""A head beside an embedding that config.json calls tied: what every reader makes of it is what transformers makes of it."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from arriero.formats import hf
from arriero.formats.detection import detect
from arriero.formats.download import resolve_model
from arriero.formats.fingerprint import weights_fingerprint
from arriero.formats.opening import open_model
from arriero.formats.paddle.config import paddle_config
from arriero.formats.paddle.names import places
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.tied_head import read_config
from arriero.formats.verification import prompt_logits
from arriero.models.config import LlamaConfig as OurConfig
from arriero.models.presets import TINY_RANDOM_LLAMA

Run = Callable[..., subprocess.CompletedProcess[str]]
TOKENIZER = resolve_model(TINY_RANDOM_LLAMA)
VOCABULARY = OurConfig.from_file(TOKENIZER).vocab_size
PROMPT = torch.arange(32)[None] * 7919 % VOCABULARY


def folder_with(tmp_path: Path, head: str, kind: str = "safetensors", shards: bool = False) -> Path:
    """A model of transformers that is called tied, and whose head is "own", a "copy", or "none"."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model, folder = LlamaForCausalLM(config), tmp_path / f"{head}-{kind}"
    folder.mkdir()
    hf.copy_side_files(TOKENIZER, folder)
    state = model.state_dict()
    if head == "copy":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    elif head == "none":
        del state["lm_head.weight"]
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif shards:
        files = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in state}
        for file in set(files.values()):
            save_file({name: state[name] for name in state if files[name] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    values = config.to_dict() | {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@torch.inference_mode()
def truth(folder: Path) -> torch.Tensor:
    """(S, V) logits of transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(PROMPT).logits[0]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("head", ["own", "copy", "none"])
def test_loading_and_converting_keep_the_head_that_transformers_keeps(
    tmp_path: Path, head: str, shards: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # libraries raise it
    folder = folder_with(tmp_path, head, shards=shards)
    wanted = truth(folder)
    loaded = hf.load_model(folder)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(PROMPT)[0], wanted, rtol=1e-5, atol=1e-5)
    assert loaded.config.tie_word_embeddings == (head != "own")
    for _ in range(3):  # many read the configuration; one tells
        assert read_config(folder) == read_config(folder)
    assert sum("keeps its own head" in record.message for record in caplog.records) == (head == "own")
    with open_model(detect(folder)) as source:  # what conversions and exports read from
        torch.testing.assert_close(prompt_logits(source), wanted, rtol=1e-5, atol=1e-5)
        assert ("lm_head.weight" in source.tensors) == (head == "own")


@pytest.mark.parametrize("to", ["hf", "gguf", "paddle", "meta"])
def test_a_conversion_writes_the_head(
    tmp_path: Path, in_process: Run, to: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    folder, output = folder_with(tmp_path, "own"), tmp_path / ("out.gguf" if to == "gguf" else "out")
    told = in_process("convert", str(folder), str(output), "--to", to, "--dtype", "float32")
    assert told.returncode == 0, told.stderr
    assert sum("keeps its own head" in record.message for record in caplog.records) == 1
    with open_model(detect(output)) as source:
        assert not source.config.tie_word_embeddings
        torch.testing.assert_close(prompt_logits(source), truth(folder), rtol=1e-5, atol=1e-5)


def test_a_bin_folder_keeps_it_too(tmp_path: Path) -> None:
    wanted = truth(folder_with(tmp_path, "own"))
    with open_model(detect(folder_with(tmp_path, "own", "bin"))) as source:
        torch.testing.assert_close(prompt_logits(source), wanted, rtol=1e-5, atol=1e-5)
        assert any("keeps its own head" in line for line in source.about)
    with open_model(detect(folder_with(tmp_path, "copy", "bin"))) as source:
        assert source.config.tie_word_embeddings


@pytest.mark.parametrize(("head", "layout"), [("own", "head"), ("copy", "head"), ("copy", "embedding")])
def test_a_paddle_folder_too(tmp_path: Path, head: str, layout: str) -> None:
    folder = folder_with(tmp_path, head)
    state, target = load_file(folder / "model.safetensors"), tmp_path / "paddle"
    config = OurConfig.from_file(folder)
    assert config.tie_word_embeddings
    target.mkdir()
    stored = {}
    for name, place in places(OurConfig.from_dict(config.to_dict() | {"tie_word_embeddings": False})).items():
        stored[place.stored.name] = state[name].t().contiguous() if place.transposed else state[name]
    if layout == "embedding":  # as PaddleNLP's tied head lies
        stored["lm_head.weight"] = state["lm_head.weight"]
    write_pdparams(target / "model_state.pdparams", stored)
    (target / "config.json").write_text(json.dumps(paddle_config(config, "float32")))
    with open_model(detect(target)) as source:
        assert source.config.tie_word_embeddings == (head == "copy")
        torch.testing.assert_close(prompt_logits(source), truth(folder), rtol=1e-5, atol=1e-5)


def test_heads_count_in_what_weights_are_known_by(tmp_path: Path) -> None:
    own = folder_with(tmp_path, "own")
    before = weights_fingerprint(own)
    state = load_file(own / "model.safetensors")
    state["lm_head.weight"][0] += 1
    save_file(state, own / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(own) != before
