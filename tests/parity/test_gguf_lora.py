"""LoRA adapters as GGUF files: the update that llama.cpp adds, computed from the file by its rule, is PEFT's."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.container import Value, write_container  # noqa: E402
from arriero.formats.gguf.lora import read_gguf_lora, write_gguf_lora  # noqa: E402
from arriero.formats.gguf.names import hf_name  # noqa: E402
from arriero.formats.peft import PeftLoraConfig, of_pattern  # noqa: E402
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.weight_shapes import weight_shapes  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_llama import tiny_config  # noqa: E402

TARGETS = ("q_proj", "k_proj", "o_proj", "up_proj")


def adapter(config: PeftLoraConfig, model: LlamaConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in weight_shapes(model).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in config.target_modules:
            rank = config.rank_of(layer)
            state[f"{layer}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
            state[f"{layer}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator)
    return state


def peft_updates(config: PeftLoraConfig, state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """PEFT's `get_delta_weight` of every adapted layer."""
    found = {}
    for name, a in state.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "lora_A":
            alpha, rank = of_pattern(config.alpha_pattern, layer, config.lora_alpha), a.shape[0]
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            found[layer] = (scale * (state[f"{layer}.lora_B.weight"].double() @ a.double())).numpy()
    return found


def llama_cpp_updates(path: Path, model: LlamaConfig) -> dict[str, np.ndarray]:
    """alpha / rank * B A (`llama_adapter_lora_weight::get_scale`, `build_lora_mm`), rows put back in HF's order."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            weight = name.removesuffix(".lora_b")
            update = alpha / b.shape[1] * b @ tensors[f"{weight}.lora_a"]
            heads = {"attn_q": model.num_attention_heads, "attn_k": model.num_key_value_heads}.get(weight.split(".")[2])
            if heads and model.model_type in ("llama", "mistral"):
                update = update.reshape(heads, -1, 2, update.shape[1]).swapaxes(1, 2).reshape(update.shape)
            found[hf_name(weight).removesuffix(".weight")] = update
    return found


CONFIGS = {
    "plain": PeftLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "rsLoRA": PeftLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True),
    "patterns": PeftLoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 8},
        alpha_pattern={"k_proj": 3.0},
    ),
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_update_is_that_of_peft(tmp_path: Path, config: PeftLoraConfig, model_type: str) -> None:
    model, path = tiny_config(model_type), tmp_path / "x.gguf"
    state = adapter(config, model)
    write_gguf_lora(path, config, state, model)
    expected, found = peft_updates(config, state), llama_cpp_updates(path, model)
    assert expected.keys() == found.keys()
    assert all(np.allclose(found[layer], expected[layer], rtol=1e-5, atol=1e-5) for layer in expected)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ("qwen2" if model_type == "qwen2" else "llama")

    read, back = read_gguf_lora(path)
    assert back.keys() == state.keys()
    again = peft_updates(read, back)
    assert all(np.allclose(again[layer], expected[layer], rtol=1e-5, atol=1e-5) for layer in expected)
    assert set(read.target_modules) == set(TARGETS)
    if config is CONFIGS["plain"]:
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert (read.r, read.lora_alpha, read.rank_pattern) == (4, 8.0, {})


def converter_file(path: Path, alpha: float, **metadata: Value) -> dict[str, Tensor]:
    """An adapter as llama.cpp's converter writes it: no word of heads."""
    config, model = CONFIGS["plain"], tiny_config()
    state = adapter(config, model)
    write_gguf_lora(path, config, state, model)
    writer = gguf.GGUFWriter(path.with_suffix(".theirs"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor in gguf.GGUFReader(path).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".theirs").replace(path)
    return state


def test_a_file_of_the_converter_needs_the_base_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    state = converter_file(path, 8.0)
    with pytest.raises(FormatError, match="give the base model"):
        read_gguf_lora(path)
    _, back = read_gguf_lora(path, tiny_config("mistral"))
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(FormatError, match="'qwen2'"):
        read_gguf_lora(path, tiny_config("qwen2"))


def test_alpha_zero_is_a_scale_of_one(tmp_path: Path) -> None:
    converter_file(tmp_path / "x.gguf", 0.0)
    config, _ = read_gguf_lora(tmp_path / "x.gguf", tiny_config())
    assert config.lora_alpha / config.r == 1.0


def test_what_an_adapter_file_cannot_hold(tmp_path: Path) -> None:
    path, config, model = tmp_path / "x.gguf", CONFIGS["plain"], tiny_config()
    state = adapter(config, model)
    a, b = torch.ones(4, 64), torch.ones(8, 4)
    cases: list[tuple[PeftLoraConfig, dict[str, Tensor], LlamaConfig, str]] = [
        (dataclasses.replace(config, use_dora=True), state, model, "DoRA"),
        (config, {**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, model, "no place for"),
        (config, {}, model, "no pair"),
        (config, dict(list(state.items())[:3]), model, "no pair of LoRA matrices of"),
        (config, state, tiny_config(hidden_size=32, head_dim=8), "another model"),
        (
            config,
            {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b},
            tiny_config(tie_word_embeddings=True),
            "embedding",
        ),
        (config, {"score.lora_A.weight": a, "score.lora_B.weight": b}, model, "score.weight has no name"),
    ]
    for settings_, tensors, shape, words in cases:
        with pytest.raises(FormatError, match=words):
            write_gguf_lora(path, settings_, tensors, shape)
    assert list(tmp_path.iterdir()) == []
    write_gguf_lora(path, config, {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}, model)
    assert read_gguf_lora(path)[0].target_modules == ("lm_head",)


GOOD: dict[str, Value] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gpt2"}, "'gpt2' is not supported"),
        ({"general.type": "model"}, "not a LoRA adapter"),
        ({"adapter.type": "control"}, "not a LoRA adapter"),
        ({"adapter.lora.alpha": math.nan}, "alpha"),
        ({"adapter.lora.alpha": 1}, "alpha"),
        ({}, "no tensors"),
    ],
)
def test_other_files(tmp_path: Path, change: dict[str, Value], words: str) -> None:
    write_container(tmp_path / "x.gguf", GOOD | change, [])
    with pytest.raises(FormatError, match=words) as caught:
        read_gguf_lora(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)


def sample() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        config = PeftLoraConfig(r=1, lora_alpha=2, target_modules=("q_proj",))
        write_gguf_lora(Path(folder) / "x.gguf", config, adapter(config, tiny_config()), tiny_config())
        return (Path(folder) / "x.gguf").read_bytes()


SAMPLE = sample()
HEADER = SAMPLE.index(b"blk.1.attn_q.weight.lora_b") + 60


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, HEADER), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_a_header(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for at, value in changes:
        content[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(bytes(content))
        try:
            read_gguf_lora(path)
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017
