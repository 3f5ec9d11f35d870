"""LoRA adapters and prefixes in Paddle's files: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arriero.adapters.lora import LoRAConfig, adapter_state, apply_lora
from arriero.adapters.peft_config import to_peft
from arriero.adapters.prefix import PrefixConfig, apply_prefix, load_prefix_state, prefix_state
from arriero.adapters.prefix_files import to_peft as prefix_to_peft
from arriero.errors import FormatError
from arriero.formats.paddle.lora import is_paddle_lora, read_paddle_lora, write_paddle_lora
from arriero.formats.paddle.pdparams_reader import read_pdparams
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.paddle.prefix import is_paddle_prefix, read_paddle_prefix, write_paddle_prefix
from arriero.formats.peft import PeftLoraConfig
from arriero.formats.peft_prefix import PeftPrefixConfig
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

MODEL = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
PROMPT = torch.tensor([[1, 5, 9, 30, 2, 7]])


def adapter_of(
    model: LlamaConfig = MODEL, targets: tuple[str, ...] | str = ("q_proj", "k_proj", "o_proj", "up_proj"), **more: Any
) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = LoRAConfig(rank=3, alpha=5.0, target_modules=targets, **more)
    adapted = LlamaForCausalLM(model)
    apply_lora(adapted, config)
    return to_peft(config, "base"), {name: torch.randn_like(tensor) for name, tensor in adapter_state(adapted).items()}


def edit(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(values))


def state_of(path: Path) -> dict[str, Tensor]:
    with read_pdparams(path) as file:
        return {name: array.load().clone() for name, array in file.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])  # of 4, each holds all key-value heads
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "o_proj", "up_proj"), ("layers.1.mlp.down_proj", "v_proj")])
def test_an_adapter_comes_back(tmp_path: Path, targets: tuple[str, ...], tp: int, dtype: torch.dtype) -> None:
    config, state = adapter_of(targets=targets, use_rslora=tp == 2)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    write_paddle_lora(tmp_path / "adapter", config, state, MODEL, tp)
    assert is_paddle_lora(tmp_path / "adapter")
    assert len(list((tmp_path / "adapter").glob("*.pdparams"))) == tp
    found, tensors = read_paddle_lora(tmp_path / "adapter")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], tensor) and tensors[name].dtype == dtype for name, tensor in state.items())
    assert (found.r, found.lora_alpha, found.use_rslora) == (3, 5, tp == 2)
    assert found.base_model_name_or_path == "base"
    again = LlamaForCausalLM(MODEL)
    layers = apply_lora(again, LoRAConfig(rank=3, alpha=5.0, target_modules=found.target_modules))
    assert {f"{layer}.lora_A.weight" for layer in layers} == {name for name in state if "lora_A" in name}


def test_trained_biases_come_back(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, model_type="qwen2", attention_bias=True)
    config, state = adapter_of(model, ("q_proj", "k_proj"), bias="lora_only")
    assert any(name.endswith("q_proj.bias") for name in state)
    write_paddle_lora(tmp_path / "adapter", config, state, model, 2)
    found, tensors = read_paddle_lora(tmp_path / "adapter")
    assert found.bias == "lora_only"
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


def test_without_a_base_model_equal_key_matrices_were_not_cut(tmp_path: Path) -> None:
    config, state = adapter_of(targets=("k_proj",))
    for tp in (2, 4):
        folder = tmp_path / str(tp)
        write_paddle_lora(folder, config, state, MODEL, tp)
        (folder / "config.json").unlink()  # as in PaddleNLP before 2.7
        tensors = read_paddle_lora(folder)[1]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    zeros = {name: tensor * ("lora_A" in name) for name, tensor in state.items()}
    write_paddle_lora(tmp_path / "zero", config, zeros, MODEL, 2)
    assert read_paddle_lora(tmp_path / "zero", MODEL)[1]["model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (
        8,
        3,
    )
    (tmp_path / "zero" / "config.json").unlink()
    with pytest.raises(FormatError, match="lora_B is zero in every file, so that nothing tells whether it was cut"):
        read_paddle_lora(tmp_path / "zero")


def test_an_adapter_of_a_unified_checkpoint_is_read(tmp_path: Path) -> None:
    config, state = adapter_of()
    write_paddle_lora(tmp_path, config, state, MODEL)
    save_file(state_of(tmp_path / "lora_model_state.pdparams"), tmp_path / "peft_model.safetensors")
    (tmp_path / "lora_model_state.pdparams").unlink()
    assert is_paddle_lora(tmp_path)
    tensors = read_paddle_lora(tmp_path)[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pissa": True}, "pissa is true .*merge it into its base model with PaddleNLP"),
        ({"loraga": True}, "loraga is true"),
        ({"use_mora": True}, "use_mora is true"),
        ({"lora_use_mixer": True}, "lora_use_mixer is true"),
        ({"do_qat": True}, "do_qat is true"),
        ({"enable_lora_list": [True, False, True]}, "enable_lora_list"),
        ({"trainable_modules": [".*norm.*"]}, "trainable_modules"),
        ({"trainable_bias": "some"}, "trainable_bias must be"),
        ({"r": 4}, "does not fit the rank 4"),
        ({"r": 0}, "r must be a whole number of at least 1"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number"),
        ({"tensor_parallel_degree": "two"}, "tensor_parallel_degree must be a whole number"),
    ],
)
def test_adapters_of_another_method_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_paddle_lora(tmp_path / "adapter", *adapter_of(), MODEL)
    edit(tmp_path / "adapter", "lora_config.json", **changes)
    with pytest.raises(FormatError, match=message) as error:
        read_paddle_lora(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_odd_matrices_are_refused_by_name(tmp_path: Path) -> None:
    write_paddle_lora(tmp_path, *adapter_of(), MODEL)
    path = tmp_path / "lora_model_state.pdparams"
    state = state_of(path)
    name = "llama.layers.0.self_attn.q_proj.lora_A"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({key: state[key] for key in state if key != name}, r"model\.layers\.0\.self_attn\.q_proj\.lora_A.*is missing"),
        (state | {"llama.norm.weight": torch.ones(16)}, "llama.norm.weight is neither a LoRA matrix nor a bias"),
        (state | {"llama.layers.0.x_proj.lora_A": torch.ones(16, 3)}, "is of no layer that a LLaMA has"),
        (state | {name: torch.ones(16)}, r"q_proj.lora_A has the shape \[16\]"),
        (state | {name: torch.ones(16, 3, dtype=torch.int32)}, "has the dtype int32"),
        ({key.replace("llama", "gpt"): state[key] for key in state}, "neither a LoRA matrix"),
        ({}, "holds no LoRA matrices"),
    ]
    for changed, message in cases:
        write_pdparams(path, changed)
        with pytest.raises(FormatError, match=message):
            read_paddle_lora(tmp_path)


def test_an_adapter_of_joined_layers_needs_the_heads(tmp_path: Path) -> None:
    write_paddle_lora(tmp_path, *adapter_of(), MODEL)
    (tmp_path / "config.json").unlink()
    joined = {"lora_A": torch.randn(16, 3), "lora_B": torch.randn(3, 32)}
    layer = "llama.layers.0.self_attn.qkv_proj"
    write_pdparams(tmp_path / "lora_model_state.pdparams", {f"{layer}.{part}": joined[part] for part in joined})
    with pytest.raises(FormatError, match="holds several layers in one, and nothing tells their heads"):
        read_paddle_lora(tmp_path)
    state = read_paddle_lora(tmp_path, MODEL)[1]
    b, own = joined["lora_B"], "model.layers.0.self_attn"
    assert torch.equal(state[f"{own}.v_proj.lora_B.weight"], torch.cat([b[:, 12:16], b[:, 28:32]], 1).t())
    assert torch.equal(state[f"{own}.q_proj.lora_A.weight"], joined["lora_A"].t())
    wider = dataclasses.replace(MODEL, hidden_size=32, num_attention_heads=8)
    with pytest.raises(FormatError, match=r"lora_B has 32 columns, config\.json asks for 48"):
        read_paddle_lora(tmp_path, wider)


def test_a_missing_file_of_a_process_is_named(tmp_path: Path) -> None:
    write_paddle_lora(tmp_path, *adapter_of(), MODEL, 2)
    (tmp_path / "lora_model_state.tp01.pdparams").unlink()
    with pytest.raises(FormatError, match=r"lora_model_state\.tp01\.pdparams: is missing"):
        read_paddle_lora(tmp_path)


def test_processes_that_differ_where_they_should_not_are_refused(tmp_path: Path) -> None:
    write_paddle_lora(tmp_path, *adapter_of(), MODEL, 2)
    path = tmp_path / "lora_model_state.tp01.pdparams"
    state = state_of(path)
    state["llama.layers.0.self_attn.q_proj.lora_A"] += 1
    write_pdparams(path, state)
    with pytest.raises(FormatError, match=r"tp01.*q_proj\.lora_A differs"):
        read_paddle_lora(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "no DoRA .*merge it into the base model"),
        ({"rank_pattern": {"q_proj": 4}}, "one rank and alpha for all layers"),
        ({"alpha_pattern": {"q_proj": 4.0}}, "one rank and alpha for all layers"),
    ],
)
def test_what_paddlenlp_lacks_is_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config, state = adapter_of()
    with pytest.raises(FormatError, match=message):
        write_paddle_lora(tmp_path / "adapter", dataclasses.replace(config, **changes), state, MODEL)
    assert not (tmp_path / "adapter").exists()


def test_an_adapted_head_is_not_written(tmp_path: Path) -> None:
    config, state = adapter_of(targets=("q_proj", "lm_head"))
    with pytest.raises(FormatError, match="adapts the linear layers of the decoder only, and there is lm_head"):
        write_paddle_lora(tmp_path / "adapter", config, state, MODEL)


def prefix_of(model: LlamaConfig, **more: Any) -> tuple[PeftPrefixConfig, dict[str, Tensor]]:
    torch.manual_seed(1)
    prefixed = LlamaForCausalLM(model)
    config = PrefixConfig(4, **more)
    apply_prefix(prefixed, config)
    state = {name: torch.randn_like(tensor) for name, tensor in prefix_state(prefixed).items()}
    return prefix_to_peft(config, model, "base"), state


def logits_of(model: LlamaConfig, config: PeftPrefixConfig, state: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(2)
    prefixed = LlamaForCausalLM(model).eval()
    for parameter in prefixed.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    size = config.encoder_hidden_size if config.prefix_projection else None
    apply_prefix(prefixed, PrefixConfig(config.num_virtual_tokens, config.prefix_projection, size))
    load_prefix_state(prefixed, state)
    with torch.no_grad():
        logits: Tensor = prefixed(PROMPT)
    return logits


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("heads", "projection", "stays"),
    # Paddle's network is as wide as the key-value heads: it can hold ours only if that is the model's width.
    [(4, False, False), (2, False, False), (4, True, True), (2, True, False)],
)
def test_a_prefix_comes_back(
    tmp_path: Path, heads: int, projection: bool, stays: bool, model_type: str, tp: int
) -> None:
    model = dataclasses.replace(MODEL, num_key_value_heads=heads, model_type=model_type, layer_types=())
    config, state = prefix_of(model, projection=projection, projection_size=6 if projection else None)
    write_paddle_prefix(tmp_path / "prefix", config, state, model, tp=tp, dropout=0.25)
    assert is_paddle_prefix(tmp_path / "prefix")
    found = read_paddle_prefix(tmp_path / "prefix", model)
    assert found.config.prefix_projection == stays
    assert found.dropout == 0.25
    wanted = logits_of(model, config, state)
    torch.testing.assert_close(logits_of(model, found.config, found.state), wanted, rtol=1e-5, atol=1e-5)
    for path in (tmp_path / "prefix").glob("*.pdparams"):
        path.unlink()
    cached = read_paddle_prefix(tmp_path / "prefix", model)
    torch.testing.assert_close(logits_of(model, cached.config, cached.state), wanted, rtol=1e-5, atol=1e-5)


def test_a_widened_network_becomes_as_narrow_as_it_was(tmp_path: Path) -> None:
    config, state = prefix_of(MODEL, projection=True, projection_size=6)
    state["prefix_encoder.embedding.weight"][:, 8:] = 0
    write_paddle_prefix(tmp_path / "prefix", config, state, MODEL)
    stored = state_of(tmp_path / "prefix" / "prefix_model_state.pdparams")
    assert stored["0.weight"].shape == (4, 8)
    assert stored["1.weight"].shape == (8, 6)
    assert read_paddle_prefix(tmp_path / "prefix", MODEL).config.prefix_projection


def np_file(array: Any) -> bytes:
    content = BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np_file(np.array([print, 1], dtype=object)), "not a valid .npy file of numbers"),
        (np_file(np.zeros((2, 2, 2, 4, 4), np.int64)), "holds int64, no floating-point numbers"),
        (np_file(np.zeros((2, 2, 2, 4, 4), ">f4")), "holds >f4, no floating-point numbers"),
        (np_file(np.zeros((2, 2, 2, 4, 5), np.float32)), r"has the shape \[2, 2, 2, 4, 5\]"),
        (np_file(np.zeros((2, 2, 2, 4, 4), np.float32))[:-9], "not a valid .npy file"),
        (np_file(np.zeros(1)).replace(b"(1,)", b"(9999999999999,)"), "not a valid .npy file"),
        (b"PK\x03\x04 an archive of arrays", "is not a .npy file"),
        (b"", "is not a .npy file"),
    ],
)
def test_bad_caches_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_paddle_prefix(tmp_path, *prefix_of(MODEL), MODEL)
    (tmp_path / "prefix_model_state.pdparams").unlink()
    (tmp_path / "pre_caches.npy").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_paddle_prefix(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"multi_query_group_num": None},
            "is for a model of 2 layers, 4 key-value heads .* the base model has 2 layers, 2",
        ),
        ({"num_hidden_layers": 10**9}, "the base model has 2 layers"),
        ({"hidden_size": 18}, "no multiple of num_attention_heads"),
        ({"num_prefix_tokens": 5}, r"0\.weight has the shape \[4, 32\], prefix_config.json asks for \[5, 32\]"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens must be a number of at least 1"),
        ({"num_prefix_tokens": None}, "num_prefix_tokens is missing"),
        ({"prefix_projection": True, "prefix_projection_hidden_size": 6}, "missing 1.bias"),
        ({"tensor_parallel_degree": 2}, None),  # of a whole file it says nothing
    ],
)
def test_prefixes_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    write_paddle_prefix(tmp_path, *prefix_of(MODEL), MODEL)
    edit(tmp_path, "prefix_config.json", **changes)
    if message is None:
        read_paddle_prefix(tmp_path, MODEL)
        return
    with pytest.raises(FormatError, match=message):
        read_paddle_prefix(tmp_path, MODEL)


def test_a_prefix_that_cannot_be_cut_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tensor_parallel_degree 4 does not divide the 2 heads of the prefix"):
        write_paddle_prefix(tmp_path / "prefix", *prefix_of(MODEL), MODEL, tp=4)
