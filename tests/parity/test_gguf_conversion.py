"""GGUF files written as llama.cpp's converter does -> HF folders: the same weights, logits and configuration."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from arriero.cli import main  # noqa: E402
from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402
from arriero.formats.gguf.model import convert_gguf  # noqa: E402
from arriero.formats.gguf.names import hf_name  # noqa: E402
from arriero.formats.hf import load_model, save_model  # noqa: E402
from arriero.formats.tiny_model import tiny_tokenizer_files  # noqa: E402
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.llama import LlamaForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_llama import tiny_config  # noqa: E402

VOCAB = 160
TOKENS = ["t", "1", "t1", *(f"w{index}" for index in range(3, VOCAB))]


def config_of(model_type: str, **changes: Any) -> LlamaConfig:
    return tiny_config(model_type, **{"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2} | changes)


def random_model(config: LlamaConfig) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not trivial, logits that are not tiny
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(
    path: Path, model: LlamaForCausalLM, arch: str | None = None, extra: Any = None, skip: tuple[str, ...] = ()
) -> Path:
    """A GGUF file as the converter writes it, F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch or ("llama" if config.model_type == "mistral" else config.model_type))
    settings = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta,
        "rope_dimension_count": config.head_dim,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": TOKENS,
        "token_types": [1] * VOCAB,
        "token_merges": ["t 1"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for key, value in settings.items():
        if key not in skip:
            getattr(writer, f"add_{key}")(value)
    if extra is not None:
        extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[(arch or writer.arch).upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = tensor.numpy()
        if writer.arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = llama_cpp_permute(array, heads)
        if target not in skip:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = {
    "llama": config_of("llama"),
    "llama, tied": config_of("llama", tie_word_embeddings=True),
    "llama, biases": config_of("llama", attention_bias=True, mlp_bias=True),
    "llama, other head_dim": config_of("llama", head_dim=32),
    "qwen2": config_of("qwen2"),
    "qwen3": config_of("qwen3"),
    "qwen3, head_dim 128": config_of("qwen3", head_dim=128),  # the only one transformers' GGUF reader knows
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_weights_and_configuration_come_back(tmp_path: Path, config: LlamaConfig) -> None:
    model = random_model(config)
    result = convert_gguf(write(tmp_path / "x.gguf", model), tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.to_dict() == replace(config, dtype="float32").to_dict()
    assert result.config.num_parameters() == config.num_parameters()
    ids = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert (theirs - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen2", "qwen3, head_dim 128"])
def test_logits_are_those_of_transformers_reading_the_gguf(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x.gguf", random_model(KINDS[kind]))
    convert_gguf(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(ids).logits - load_model(tmp_path / "out")(ids)).abs().max() < 1e-4


def test_hf_names_cover_the_gguf_name_map() -> None:
    for arch in ("LLAMA", "QWEN2", "QWEN3"):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 12)
        for name in LlamaForCausalLM(config_of(arch.lower())).state_dict():
            assert hf_name(names.get_name(name, try_suffixes=(".weight", ".bias"))) == name


# RoPE scaling


def llama3_factors(config: LlamaConfig, scaling: dict[str, Any]) -> np.ndarray:
    """`generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    base, dim = config.rope_theta, config.head_dim
    freqs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    context = scaling["original_max_position_embeddings"]
    low_wavelen, high_wavelen = context / scaling["low_freq_factor"], context / scaling["high_freq_factor"]
    factors = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_wavelen:
            factors.append(1)
        elif wavelen > low_wavelen:
            factors.append(scaling["factor"])
        else:
            smooth = (context / wavelen - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 2048), (1.5, 4096)])
def test_llama3_scaling_is_recovered(tmp_path: Path, factor: float, context: int) -> None:
    scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": context}
    config = config_of("llama", rope_theta=500000.0, max_position_embeddings=131072, rope_scaling=scaling, head_dim=64)
    model = random_model(config)

    def add(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, scaling))

    convert_gguf(write(tmp_path / "x.gguf", model, extra=add), tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config.rope_scaling == config.rope_scaling
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    for factors in (np.full(8, 3.0), np.linspace(1, 8, 8), np.full(8, np.nan), np.full(5, 1.0)):

        def add(writer: Any, factors: np.ndarray = factors) -> None:
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

        path = write(tmp_path / "x.gguf", random_model(KINDS["llama"]), extra=add)
        with pytest.raises(FormatError, match="rope_freqs"):
            convert_gguf(path, tmp_path / "out")


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.5)
        writer.add_rope_scaling_orig_ctx_len(64)

    def longrope(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(2.0)

    model = random_model(KINDS["llama"])
    scaling = convert_gguf(write(tmp_path / "a.gguf", model, extra=linear), tmp_path / "a").config.rope_scaling
    assert scaling == config_of("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}).rope_scaling
    scaling = convert_gguf(write(tmp_path / "b.gguf", model, extra=yarn), tmp_path / "b").config.rope_scaling
    wanted = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 64}
    assert scaling == config_of("llama", rope_scaling=wanted).rope_scaling
    with pytest.raises(FormatError, match="longrope"):
        convert_gguf(write(tmp_path / "c.gguf", model, extra=longrope), tmp_path / "c")


def test_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    config = config_of("mistral", sliding_window=16)
    model = random_model(config)
    path = write(tmp_path / "x.gguf", model, extra=lambda writer: writer.add_sliding_window(16))
    convert_gguf(path, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config.to_dict() == replace(config, dtype="float32").to_dict()
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


# What is refused


@pytest.mark.parametrize(
    "key",
    ["context_length", "block_count", "embedding_length", "feed_forward_length", "head_count", "layer_norm_rms_eps"],
)
def test_missing_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "x.gguf", random_model(KINDS["llama"]), skip=(key,))
    with pytest.raises(FormatError, match=key.replace("layer_norm_rms_eps", "layer_norm_rms_epsilon")):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("token_embd.weight", "no token_embd.weight"),
        ("output_norm.weight", "missing model.norm.weight"),
        ("blk.1.ffn_down.weight", "missing model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_missing_tensor(tmp_path: Path, name: str, words: str) -> None:
    path = write(tmp_path / "x.gguf", random_model(KINDS["llama"]), skip=(name,))
    with pytest.raises(FormatError, match=words):
        convert_gguf(path, tmp_path / "out")


REFUSED = {
    "experts": (lambda writer: writer.add_expert_count(8), "mixture of experts"),
    "other tensor": (lambda writer: writer.add_tensor("blk.0.ssm_a.weight", np.ones(3, np.float32)), "ssm_a"),
    "layer too many": (lambda writer: writer.add_tensor("blk.7.attn_norm.weight", np.ones(64, np.float32)), "layers.7"),
}


@pytest.mark.parametrize(("extra", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_content(tmp_path: Path, extra: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        convert_gguf(write(tmp_path / "x.gguf", random_model(KINDS["llama"]), extra=extra), tmp_path / "out")


def test_tensor_of_a_type_without_dequantiser(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_tensor("output_norm.weight", np.ones(64, np.int8))

    path = write(tmp_path / "x.gguf", random_model(KINDS["llama"]), extra=add, skip=("output_norm.weight",))
    with pytest.raises(FormatError, match=r"output_norm\.weight has type I8"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CHANGED = {
    "other architecture": ({}, "falcon", "falcon"),
    "partial rotation": ({"rope_dimension_count": 8}, None, "rope.dimension_count"),
    "hostile layer count": ({"block_count": 9000}, None, "9000 layers"),
    "no heads": ({"head_count": 0}, None, "head_count"),
    "wrong width": ({"embedding_length": 128}, None, "shape"),
    "tokens over the embedding": ({"token_list": [*TOKENS, "more"]}, None, "161 tokens"),
}


@pytest.mark.parametrize(("values", "arch", "words"), CHANGED.values(), ids=CHANGED.keys())
def test_contradictory_metadata(tmp_path: Path, values: dict[str, Any], arch: str | None, words: str) -> None:
    def change(writer: Any) -> None:
        for key, value in values.items():
            getattr(writer, f"add_{key}")(value)
        if "token_list" in values:
            writer.add_token_types([1] * len(values["token_list"]))

    skip = (*values, *(("token_types",) if "token_list" in values else ()))
    model = random_model(KINDS["llama"])
    if arch:
        path = tmp_path / "x.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    else:
        path = write(tmp_path / "x.gguf", model, extra=change, skip=skip)
    with pytest.raises(FormatError, match=words) as caught:
        convert_gguf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# The real model


@pytest.fixture(scope="module")
def converted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    convert_gguf(smollm2_gguf, folder)
    return folder


@pytest.mark.slow
def test_smollm2_weights(converted: Path, smollm2_gguf: Path) -> None:
    """Q4_1 by its formula, over a whole matrix; the permutation by its own formula; the embedding by `GGUFReader`."""
    model = load_model(converted)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    state = model.state_dict()
    for name, heads in (("attn_q", 9), ("attn_k", 3), ("ffn_down", None)):
        raw = np.asarray(tensors[f"blk.3.{name}.weight"].data).reshape(-1, 20)
        d, m = raw[:, :2].copy().view("<f2").astype(np.float32), raw[:, 2:4].copy().view("<f2").astype(np.float32)
        nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
        columns = int(tensors[f"blk.3.{name}.weight"].shape[0])
        plain = (d * nibbles + m).reshape(-1, columns)
        found = state[
            "model.layers.3."
            + {
                "attn_q": "self_attn.q_proj.weight",
                "attn_k": "self_attn.k_proj.weight",
                "ffn_down": "mlp.down_proj.weight",
            }[name]
        ].numpy()
        if heads is not None:
            found = llama_cpp_permute(found, heads)
        assert np.array_equal(found, plain)
    embedding = tensors["token_embd.weight"]
    assert np.array_equal(
        state["model.embed_tokens.weight"].numpy(), gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    )


@pytest.mark.slow
def test_smollm2_logits_and_chat(converted: Path, smollm2_gguf: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = torch.tensor([tokenizer(text).input_ids])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).double()
    with torch.no_grad():
        logits = load_model(converted, torch.float64)(ids)  # transformers has angles and norms in fp32 even so: 2.4e-5
        assert (theirs(ids).logits - logits).abs().max() <= 5e-5
        folder = transformers.AutoModelForCausalLM.from_pretrained(converted)
        answer = folder.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    config = json.loads((converted / "generation_config.json").read_text())
    assert config["eos_token_id"] == 2


@pytest.mark.slow
def test_smollm2_tokens(converted: Path, smollm2_gguf: Path) -> None:
    """Against transformers' GGUF reader, and against the model's published pre-tokenizer (Digits, ByteLevel).

    transformers ignores `tokenizer.ggml.pre` = smollm, so it differs around digits; those lines are left out there.
    """
    ours = transformers.AutoTokenizer.from_pretrained(converted)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert len(ours) == len(theirs) == 49152
    with GGUFFile(smollm2_gguf) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    assert ours.convert_ids_to_tokens(range(49152)) == tokens
    published = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    )
    published.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    lines = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines(keepends=True)
    for text in [*lines, "naïve café 漢字 🚀 I'll 12345.67", "  a   b\t\n\n c ", "\x00 ½ ² don't", ""]:
        ids = ours(text).input_ids
        assert ids == published.encode(text).ids
        assert ours.decode(ids) == text
        if not any(letter.isnumeric() for letter in text):
            assert ids == theirs(text).input_ids
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert ours(chat).input_ids == theirs(chat).input_ids
    assert ours(chat).input_ids[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_torch_has_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices in 16 bits are not widened because norms are in F32, as they are in every GGUF file."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.init_weights(1)
    save_model(model.to(dtype), config, tmp_path / "hf")
    for name, content in tiny_tokenizer_files().items():
        (tmp_path / "hf" / name).write_bytes(content)
    for source, target in (("hf", "m.gguf"), ("m.gguf", "again.gguf"), ("again.gguf", "back")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
    assert (tmp_path / "m.gguf").stat().st_size == (tmp_path / "again.gguf").stat().st_size
    back = load_file(tmp_path / "back/model.safetensors")
    for name, tensor in load_file(tmp_path / "hf/model.safetensors").items():
        assert torch.equal(back[name].to(dtype), tensor)
        assert back[name].dtype == dtype or tensor.ndim == 1
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
