"""GGUF files of ours, read by the gguf package and by our own reader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.container import TensorToWrite, pack, write_container  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402
from arriero.formats.gguf.metadata import licence_keys, model_metadata  # noqa: E402
from arriero.formats.gguf.model import open_gguf  # noqa: E402
from arriero.formats.gguf.model_writer import write_gguf  # noqa: E402
from arriero.formats.gguf.names import gguf_name, hf_name, name_table  # noqa: E402
from arriero.formats.gguf.tensor_types import ALIASES, F16, KINDS, Q4_K, Q5_K, Q6_K, choose_type  # noqa: E402
from arriero.formats.gguf.tokenizer_writer import tokenizer_metadata  # noqa: E402
from arriero.formats.safe_tensors import LazyTensor  # noqa: E402
from arriero.formats.source import ModelSource  # noqa: E402
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.llama import LlamaForCausalLM  # noqa: E402
from arriero.models.weight_shapes import weight_shapes  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_llama import tiny_config  # noqa: E402

TOKENS = ["t", "1", "t1", "<s>", "</s>", "<end>"]
TOKENIZER = {
    "added_tokens": [{"id": 3 + at, "content": token, "special": True} for at, token in enumerate(TOKENS[3:])],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"t": 0, "1": 1, "t1": 2}, "merges": [["t", "1"]]},
}
SETTINGS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages[0].content }}"}
FILES = {
    "tokenizer.json": json.dumps(TOKENIZER).encode(),
    "tokenizer_config.json": json.dumps(SETTINGS).encode(),
    "LICENSE": b"                                 Apache License\n                           Version 2.0, January 2004",
}
TYPES = gguf.GGMLQuantizationType


def config_of(model_type: str = "llama", **changes: Any) -> LlamaConfig:
    return tiny_config(model_type, **{"bos_token_id": 3, "eos_token_id": 4} | changes)


def weights(config: LlamaConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(config).items()}


def source(config: LlamaConfig, files: dict[str, bytes] = FILES, **tensors: Any) -> ModelSource:
    return ModelSource(Path("a folder/my-model"), "hf", config, {**weights(config), **tensors}, files)


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def test_metadata_are_those_of_the_converter(tmp_path: Path) -> None:
    config = config_of()
    assert write_gguf(source(config), tmp_path / "x.gguf", kind="q8_0") == ()
    assert fields(tmp_path / "x.gguf") == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "my-model",
        "general.size_label": gguf.size_label(config.num_parameters(), 0, 0, 0),
        "general.license": "apache-2.0",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 8,
        "llama.rope.dimension_count": 16,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": [*TOKENS, "[PAD6]", "[PAD7]"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 3, 5, 5],
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def llama3(**changes: float) -> LlamaConfig:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return config_of(rope_scaling={"rope_type": "llama3", **scaling, **changes})


FAMILIES = {
    "llama": config_of(),
    "llama, tied": config_of(tie_word_embeddings=True),
    "llama, biases": config_of(attention_bias=True, mlp_bias=True),
    "llama, other head_dim": config_of(head_dim=32),
    "mistral": config_of("mistral", sliding_window=16),
    "qwen2": config_of("qwen2"),
    "qwen3": config_of("qwen3", head_dim=32),
    "several ends": config_of(eos_token_id=[4, 5]),
    "linear": config_of(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "yarn": config_of(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "yarn, all": config_of(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    ),
    "llama3": llama3(),
    "llama3, short context": llama3(original_max_position_embeddings=64),
    "llama3, other bounds": llama3(low_freq_factor=0.5, high_freq_factor=7.5, original_max_position_embeddings=150),
    "llama3, fraction": llama3(factor=8.3, original_max_position_embeddings=77.5),
    "llama3, nothing stretched": llama3(original_max_position_embeddings=2**30),
    "llama3, all stretched": llama3(original_max_position_embeddings=2),
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_there_and_back(tmp_path: Path, config: LlamaConfig) -> None:
    original = source(config)
    write_gguf(original, tmp_path / "x.gguf", kind="f32")
    with open_gguf(tmp_path / "x.gguf") as again:
        assert again.tensors.keys() == original.tensors.keys()
        for name, tensor in again.tensors.items():
            assert isinstance(tensor, LazyTensor)
            assert torch.equal(tensor.load(), original.tensors[name]), name
        assert again.config.to_dict() == dataclasses.replace(config, dtype="float32").to_dict()
        settings = json.loads(again.files["tokenizer_config.json"])
        assert settings["chat_template"] == SETTINGS["chat_template"]
        tokenizer = json.loads(again.files["tokenizer.json"])
        assert tokenizer["model"]["vocab"] == TOKENIZER["model"]["vocab"]
        assert [token["content"] for token in tokenizer["added_tokens"]] == TOKENS[3:]
    # what we write of what we read is the same file
    with open_gguf(tmp_path / "x.gguf") as again:
        write_gguf(dataclasses.replace(again, path=original.path), tmp_path / "y.gguf", kind="f32")
    licence = {"general.license"}  # the file's licence is named, its text is not in it
    assert {k: v for k, v in fields(tmp_path / "x.gguf").items() if k not in licence} == fields(tmp_path / "y.gguf")


def own_keys_of(config: LlamaConfig, path: Path) -> dict[str, Any]:
    write_gguf(source(config), path, kind="f32")
    return {key: value for key, value in fields(path).items() if key.startswith("arriero.")}


def test_keys_of_ours_only_where_the_divisors_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert own_keys_of(FAMILIES["llama3"], path) == {}
    assert own_keys_of(FAMILIES["llama3, short context"], path) == {}
    assert own_keys_of(FAMILIES["llama3, other bounds"], path) == {
        "arriero.rope.llama3.factor": 8.0,
        "arriero.rope.llama3.low_freq_factor": 0.5,
        "arriero.rope.llama3.high_freq_factor": 7.5,
        "arriero.rope.llama3.original_max_position_embeddings": 150,
    }
    # keys that do not give the divisors are not believed
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 7.5), struct.pack("<f", 7.0)))
    with pytest.raises(FormatError, match=r"the divisors in rope_freqs\.weight"):
        open_gguf(path)


def test_rows_are_permuted_as_llama_cpp_does(tmp_path: Path) -> None:
    """`LlamaModel.permute` of llama.cpp's converter, written out."""
    config = config_of()
    write_gguf(source(config), tmp_path / "x.gguf", kind="f32")
    with GGUFFile(tmp_path / "x.gguf") as file:
        for letter, heads in (("q", 4), ("k", 2)):
            weight = weights(config)[f"model.layers.1.self_attn.{letter}_proj.weight"].numpy()
            expected = weight.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(weight.shape)
            assert np.array_equal(file.dequantize(f"blk.1.attn_{letter}.weight"), expected)


def test_names_are_those_of_the_gguf_package() -> None:
    for arch in ("LLAMA", "QWEN2", "QWEN3"):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 2)
        for name in LlamaForCausalLM(config_of(arch.lower(), head_dim=32)).state_dict():
            assert gguf_name(name) == names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert hf_name(gguf_name(name)) == name
    rows = name_table()
    assert {row.hf.format(layer=1) for row in rows} >= {name for name in weight_shapes(config_of()) if ".1." in name}
    assert all(gguf_name(row.hf.format(layer=1)) == row.gguf.format(layer=1) for row in rows)
    assert [row.gguf for row in rows if row.permuted] == ["blk.{layer}.attn_q.weight", "blk.{layer}.attn_k.weight"]
    with pytest.raises(FormatError, match="no name in GGUF"):
        gguf_name("model.layers.0.mlp.router.weight")


# Number formats

SUPER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 16,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path: Path, kind: str) -> None:
    """Values as the gguf package dequantises them; bytes as it quantises, where it can."""
    config = config_of(**SUPER, num_hidden_layers=1)
    originals = weights(config)
    write_gguf(source(config, **originals), tmp_path / "x.gguf", kind=kind)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.file_type"].contents() == KINDS[kind].file_type
    exact = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(kind)
    with open_gguf(tmp_path / "x.gguf") as ours, GGUFFile(tmp_path / "x.gguf") as file:
        assert len(reader.tensors) == len(ours.tensors)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(file.tensors[tensor.name].shape)
            assert np.array_equal(values, file.dequantize(tensor.name))
            original = originals[hf_name(tensor.name)]
            loaded = ours.tensors[hf_name(tensor.name)].load()
            if len(original.shape) == 1:
                assert tensor.tensor_type == TYPES.F32
            if exact is not None or len(original.shape) == 1:
                assert torch.equal(loaded, original.to(exact if len(original.shape) > 1 else None).float())
                continue
            error = ((loaded - original).pow(2).mean() / original.pow(2).mean()).sqrt().item()
            assert error < {4: 0.1, 5: 0.05, 6: 0.025, 8: 0.006}[int(tensor.tensor_type.name[1])], tensor.name
            if (
                not tensor.tensor_type.name.endswith("K")
                and ".attn_q" not in tensor.name
                and ".attn_k" not in tensor.name
            ):
                expected = gguf.quants.quantize(original.numpy(), tensor.tensor_type)
                assert np.array_equal(tensor.data.reshape(expected.shape), expected)


def test_mixes_are_those_of_llama_quantize() -> None:
    """Q4_K_M of llama.cpp's src/llama-quant.cpp with 8 layers: more bits in layers 0, 3, 6 and 7."""
    config = config_of(**SUPER, num_hidden_layers=8)
    found: dict[str, dict[str, str]] = {}
    for kind in ("q4_k_m", "q4_k_s", "q5_k_m", "q4_0"):
        choices = {
            name: choose_type(gguf_name(name), shape, KINDS[kind], config)
            for name, shape in weight_shapes(config).items()
        }
        found[kind] = {gguf_name(name): choice.name for name, choice in choices.items()}
    better = {f"blk.{layer}.{name}.weight" for layer in (0, 3, 6, 7) for name in ("attn_v", "ffn_down")}
    for kind, base in (("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")):
        assert {name for name, tensor in found[kind].items() if tensor == "Q6_K"} == {*better, "output.weight"}
        assert set(found[kind].values()) == {base, "Q6_K", "F32"}
    fifth = {"blk.0.ffn_down.weight"} | {f"blk.{layer}.attn_v.weight" for layer in range(4)}
    assert {name for name, tensor in found["q4_k_s"].items() if tensor == "Q5_K"} == fifth
    assert {name for name, tensor in found["q4_0"].items() if tensor == "Q6_K"} == {"output.weight"}
    assert ALIASES["q4_k"] == "q4_k_m"


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    config = config_of(intermediate_size=72)
    lines = write_gguf(source(config), tmp_path / "x.gguf", kind="q4_k_m")
    assert lines == (
        "rows are no multiple of 256, so instead of Q4_K: token_embd.weight Q5_0, blk.0.attn_q.weight Q5_0, "
        "blk.0.attn_k.weight Q5_0 and 13 more",
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.1.ffn_down.weight"] == "F16"
    assert types["blk.1.ffn_up.weight"] == "Q5_0"
    assert types["output.weight"] == "Q8_0"


def rows(name: str) -> np.ndarray:
    generator = np.random.default_rng(1)
    values = generator.standard_normal((32, 512)).astype(np.float32)
    match name:
        case "heavy tails":
            values = generator.standard_t(2, (32, 512)).astype(np.float32)
        case "positive":
            values = np.abs(values)
        case "zeros":
            values[generator.random(values.shape) < 0.5] = 0
            values[0], values[1, :256], values[2, 32:64] = 0, 1.5, 0
            values[3] *= 1e-20
    return values


# SHA-256 of what `ggml_quantize_chunk` of llama.cpp (ggml 0.25.3) makes of `rows(name)` in Q4_K, Q5_K and Q6_K.
GGML = {
    "normal": ("9b5b23b3c11c302f", "9ff97a113cddab4e", "e18138b7e0b424c7"),
    "heavy tails": ("0667c5e39df0fc69", "4c0a28632b92c39a", "82aed4edc125a1a6"),
    "positive": ("2bceb90238129703", "9ef52d83fedb4f26", "fae9c7593a5d9f29"),
    "zeros": ("ee1cd9f577d385e4", "f1e9b5d8b5f5304a", "03c7ba8be0cc535f"),
}


@pytest.mark.parametrize("name", GGML)
def test_k_types_are_those_of_ggml(name: str) -> None:
    values = rows(name)
    packed = [pack(torch.from_numpy(values), kind, "x") for kind in (Q4_K, Q5_K, Q6_K)]
    assert tuple(hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in packed) == GGML[name]

    def error(back: np.ndarray) -> float:
        return float(np.sqrt(np.mean((back - values) ** 2)))

    plain = error(gguf.quants.dequantize(gguf.quants.quantize(values, TYPES.Q4_0), TYPES.Q4_0))
    errors = [
        error(gguf.quants.dequantize(part, TYPES(kind.number)))
        for part, kind in zip(packed, (Q4_K, Q5_K, Q6_K), strict=True)
    ]
    assert plain > errors[0] > errors[1] > errors[2]


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    large = torch.full((96, 64), 70000.0)
    bad = source(config_of(), **{name: large})
    with pytest.raises(FormatError, match=r"x\.gguf: blk\.0\.ffn_up\.weight has values beyond 65504"):
        write_gguf(bad, tmp_path / "x.gguf", kind="f16")
    broken = source(config_of(), **{name: large.fill_(math.nan)})
    for kind in ("q8_0", "q4_k"):
        with pytest.raises(FormatError, match="infinite or no numbers"):
            write_gguf(broken, tmp_path / "x.gguf", kind=kind)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match="'q3_k' is not one of f32, f16"):
        write_gguf(source(config_of()), tmp_path / "x.gguf", kind="q3_k")


# The file as a whole


def test_one_tensor_at_a_time_and_progress(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def lazy(tensor: Tensor) -> LazyTensor:
        def load() -> Tensor:
            assert sum(reference() is not None for reference in alive) <= 1
            made = tensor.clone()
            alive.append(weakref.ref(made))
            return made

        return LazyTensor(tuple(tensor.shape), tensor.dtype, load)

    config = config_of()
    told: list[tuple[int, int]] = []
    original = source(config, **{name: lazy(tensor) for name, tensor in weights(config).items()})
    write_gguf(original, tmp_path / "x.gguf", kind="bf16", progress=lambda done, total: told.append((done, total)))
    assert len(alive) == len(told) == len(original.tensors)
    assert told[-1][0] == told[-1][1] == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(source(config_of()), path, kind="f32")
    before = path.read_bytes()

    def fail() -> Tensor:
        raise FormatError("the last tensor cannot be read")

    broken = source(config_of(), **{"lm_head.weight": LazyTensor((8, 64), torch.float32, fail)})
    with pytest.raises(FormatError, match="the last tensor"):
        write_gguf(broken, path, kind="f32")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]
    with pytest.raises(FormatError, match="is a folder"):
        write_gguf(source(config_of()), tmp_path, kind="f32")
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="cannot be written"):
        write_gguf(source(config_of()), tmp_path / "file" / "x.gguf", kind="f32")


def test_values_that_metadata_cannot_hold(tmp_path: Path) -> None:
    for value in (2**32, -1, "\ud800", [2**31]):
        with pytest.raises(FormatError, match=r"a\.key cannot be stored"):
            write_container(tmp_path / "x.gguf", {"a.key": value}, [])
    write_container(tmp_path / "x.gguf", {"a": [1.5, 2.5], "b": True, "c": ["x", "ü"], "d": 7}, [])
    assert fields(tmp_path / "x.gguf") == {"a": [1.5, 2.5], "b": True, "c": ["x", "ü"], "d": 7}
    tensor = TensorToWrite("a", (3, 5), F16, torch.ones(3, 5))
    write_container(tmp_path / "x.gguf", {}, [tensor, dataclasses.replace(tensor, name="b")])
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.dequantize("b").tolist() == torch.ones(3, 5).tolist()


# What is said about a model, and what is refused


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path) -> None:
    lines = write_gguf(source(config_of("mistral", sliding_window=16)), tmp_path / "x.gguf", kind="f32")
    assert len(lines) == 1
    assert "window of 16 tokens" in lines[0]
    assert "beta_fast" in write_gguf(source(FAMILIES["yarn, all"]), tmp_path / "x.gguf", kind="f32")[0]


REFUSED = {
    "llama3 in Qwen": (config_of("qwen2", rope_scaling=dict(FAMILIES["llama3"].rope_scaling or {})), "'llama3'"),
    "window of some layers": (
        config_of("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1),
        r"a sliding window \(16 tokens\).*'qwen2'",
    ),
    "dynamic": (config_of(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic RoPE"),
    "factor below 1": (config_of(rope_scaling={"rope_type": "linear", "factor": 0.5}), r"below 1 \(0\.5\)"),
    "o_proj's bias in Qwen": (config_of("qwen3", head_dim=16, attention_bias=True), "o_proj"),
    "YaRN without truncation": (
        config_of(
            rope_scaling={
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            }
        ),
        "truncate",
    ),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_models_without_an_equal(tmp_path: Path, config: LlamaConfig, words: str) -> None:
    with pytest.raises(FormatError, match=f"GGUF has no word for .*{words}.*: convert to hf") as caught:
        write_gguf(source(config), tmp_path / "x.gguf", kind="f32")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"model\.norm\.weight has the shape \[3\]"):
        write_gguf(source(config_of(), **{"model.norm.weight": torch.ones(3)}), tmp_path / "x.gguf", kind="f32")


def test_licences() -> None:
    assert licence_keys({"LICENSE": b"MIT License\n\nCopyright"}) == {"general.license": "mit"}
    assert licence_keys({"LICENSE.txt": b"LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}) == {"general.license": "llama3.1"}
    own = {"general.license": "other", "general.license.name": "My terms"}
    assert licence_keys({"LICENCE": b"\n  My terms\nNo."}) == own
    assert licence_keys({"NOTICE": b"Apache License Version 2.0"}) == {}


# A real model


def test_smollm2_has_the_metadata_of_its_original(smollm2_gguf: Path) -> None:
    """Everything that decides what llama.cpp computes is in the file that its converter wrote, and the same here."""
    with open_gguf(smollm2_gguf) as original, GGUFFile(smollm2_gguf) as file:
        keys, lines = tokenizer_metadata(original.files, original.config, "x")
        ours = keys | model_metadata(original.config, "SmolLM2", original.files, 3)
        theirs = file.metadata
    assert lines == []
    added = {
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "tokenizer.ggml.add_eos_token": False,
    }
    described = {"general.name", "general.organization", "general.finetune", "general.basename", "general.languages"}
    rest = {key: value for key, value in theirs.items() if key not in described | {"general.license"}}
    rounded = {key: float(np.float32(value)) if type(value) is float else value for key, value in ours.items()}
    assert {key: value for key, value in rounded.items() if key != "general.name"} == rest | added
