"""Quantized folders against the libraries whose formats they have: compressed-tensors, bitsandbytes, transformers."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization import nf4
from arriero.quantization.integers import IntegerScheme, absmax_scales, quantize
from arriero.quantization.linear import QuantizedLinear, dequantize_layers, linear_layers
from arriero.quantization.post_training import quantize_model
from arriero.quantization.schemes import Activation, Fp8Weights, IntegerWeights, Nf4Weights, WeightScheme
from arriero.training.quantizing import save_quantized

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
bitsandbytes = pytest.importorskip("bitsandbytes")

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
SCHEMES: dict[str, WeightScheme] = {
    "int8": IntegerWeights(IntegerScheme(8)),
    "int4": IntegerWeights(IntegerScheme(4, 32)),
    "int4, bf16 scales": IntegerWeights(IntegerScheme(4, 32), torch.bfloat16),
    "fp8": Fp8Weights(),
    "a8w8": IntegerWeights(IntegerScheme(8), activation=Activation(), packed=False),
    "a8w8 dynamic": IntegerWeights(IntegerScheme(8), activation=Activation(dynamic=True), packed=False),
    "a8w4": IntegerWeights(IntegerScheme(4), activation=Activation(), packed=False),
}
IDS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))


def make_quantized(folder: Path, scheme: WeightScheme, config: LlamaConfig = CONFIG) -> Path:
    """A quantized folder of a random model."""
    model = LlamaForCausalLM(config)
    model.init_weights(1)
    hf.save_model(model, config, folder / "plain")
    dtype = scheme.scale_dtype if isinstance(scheme, IntegerWeights | Fp8Weights) else torch.float32
    quantize_model(model, scheme, "rtn", [IDS[:1]], dtype)
    save_quantized(model, scheme, dtype, folder / "plain", folder / "quantized")
    return folder / "quantized"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_compressed_folders(tmp_path: Path, name: str) -> None:
    folder = make_quantized(tmp_path, SCHEMES[name], TIED if name == "int4" else CONFIG)
    own = hf.load_model(folder, dtype="float32")
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if SCHEMES[name].activation is None:
        torch.testing.assert_close(logits(own), logits(other), rtol=1e-5, atol=1e-5)
    else:  # layer by layer: an activation between two integers goes either way by the last bit of the layer before
        logits(other)  # the weights are unpacked at the first pass
        x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
        for layer, (_, size) in linear_layers(CONFIG).items():
            with torch.no_grad():
                found, expected = own.get_submodule(layer)(x[..., :size]), other.get_submodule(layer)(x[..., :size])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_integers_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as reference

    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    for bits, group in ((4, 32), (8, None)):
        scheme = IntegerScheme(bits, group)
        scales = absmax_scales(weight, scheme)
        strategy = "channel" if group is None else "group"
        arguments = QuantizationArgs(num_bits=bits, group_size=group, strategy=strategy, symmetric=True)
        expected = reference(weight, scales, None, arguments, dtype=torch.int8)
        assert torch.equal(quantize(weight, scales, scheme), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nf4_bytes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 64:128] = 0  # a block without a magnitude
    stored = Nf4Weights().quantize(weight)
    packed, state = bitsandbytes.functional.quantize_nf4(weight, blocksize=64)
    assert torch.equal(stored["weight"].view(-1, 1), packed)
    assert torch.equal(stored["weight_absmax"].view(-1), state.absmax)
    assert torch.equal(torch.tensor(nf4.LEVELS), state.code)
    for wanted in (torch.float32, torch.bfloat16):
        state.dtype = wanted
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        assert torch.equal(Nf4Weights().dequantize(stored, wanted), expected)


def test_bitsandbytes_reads_nf4_folders(tmp_path: Path) -> None:
    """Its matrix product on a CPU rounds to bf16, so that weights are compared, and logits with its weights in our model."""
    folder = make_quantized(tmp_path, Nf4Weights())
    own = hf.load_model(folder, dtype="float32")
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in linear_layers(CONFIG):
        weight = other.get_submodule(name).weight
        expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(own.get_submodule(name).dequantized(), expected)  # type: ignore[operator]
    expected = logits(own)
    dequantize_layers(own)
    torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_reads_a_folder_that_transformers_wrote_with_bitsandbytes(tmp_path: Path, double: bool) -> None:
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(1)
    hf.save_model(model, CONFIG, tmp_path / "plain")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head"],
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32
    )
    other.save_pretrained(tmp_path / "theirs")
    own = hf.load_model(tmp_path / "theirs")
    for name in linear_layers(CONFIG):
        weight = other.get_submodule(name).weight
        expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        torch.testing.assert_close(own.get_submodule(name).dequantized(), expected, rtol=1e-6, atol=1e-7)  # type: ignore[operator]


def test_loading_quantizes_as_the_folder_was(tmp_path: Path) -> None:
    """Of QLoRA's base: quantized while it is read."""
    for scheme in (Nf4Weights(), IntegerWeights(IntegerScheme(8))):
        shutil.rmtree(tmp_path, ignore_errors=True)
        model = LlamaForCausalLM(TIED)
        model.init_weights(1)
        hf.save_model(model, TIED, tmp_path / "plain")
        read = hf.load_model(tmp_path / "plain", scheme=scheme)
        for name in linear_layers(TIED):
            layer = read.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            expected = scheme.quantize(model.get_submodule(name).weight.detach())  # type: ignore[operator, union-attr]
            assert all(torch.equal(tensor, expected[part]) for part, tensor in layer.stored().items())
        assert read.lm_head.weight is read.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["int4, bf16 scales", "fp8"])
def test_dequantizing_gives_a_plain_folder(tmp_path: Path, name: str) -> None:
    """What `arriero convert` does."""
    folder = make_quantized(tmp_path, SCHEMES[name], TIED)
    config = LlamaConfig.from_file(folder)
    hf.save_model(hf.open_state(folder, config), config, tmp_path / "again", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    rounded = dict(hf.load_state(folder))  # into the dtype of the model
    for key, tensor in load_file(tmp_path / "again/model.safetensors").items():
        assert rounded[key].dtype == hf.parse_dtype(config.dtype)
        assert torch.equal(tensor, rounded[key].float())
    exact = dict(hf.load_state(folder, "float32"))
    again = hf.load_model(folder, dtype="float32")
    dequantize_layers(again)
    for key, tensor in again.state_dict().items():
        if key != "lm_head.weight":
            assert torch.equal(tensor, exact[key])


def rewrite(folder: Path, change: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    values = json.loads((folder / "config.json").read_text())
    target = values["quantization_config"]
    for path, value in change.items():
        *parents, last = path.split(".")
        at = target
        for parent in parents:
            at = at[parent]
        at[last] = value
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        state = load_file(folder / "model.safetensors") | tensors
        save_file({key: tensor for key, tensor in state.items() if tensor.numel()}, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        ({"quant_method": "gptq"}, None, "the method 'gptq' cannot be read"),
        ({"format": "marlin-24"}, None, "only one config group, in one of the formats"),
        ({"config_groups": {}}, None, "only one config group"),
        ({f"{WEIGHTS}.symmetric": False}, None, "only symmetric, static weights"),
        ({f"{WEIGHTS}.num_bits": 3}, None, "weights of 3 bits"),
        ({f"{WEIGHTS}.group_size": "many"}, None, "a group_size of 'many'"),
        ({f"{WEIGHTS}.group_size": 48}, None, "48 does not divide the 128 inputs"),
        ({f"{WEIGHTS}.group_size": 64}, None, r"has the shape \[64, 4\], this scheme asks for \[64, 2\]"),
        ({f"{WEIGHTS}.actorder": "group"}, None, "the order of activations"),
        ({"config_groups.group_0.input_activations": {"num_bits": 4}}, None, "activations are read as symmetric 8-bit"),
        # what changes the computation in ways that are not done here
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, None, "transform_config is {'config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, None, "sparsity_config is {'format': 'sparse-24"),
        ({"moe_sparsity_config": {"format": "dense-2"}}, None, "moe_sparsity_config is"),
        ({"rotation": "yes"}, None, "rotation is yes, which is not read here and may change the model"),
        ({"config_groups.group_0.output_activations": {"num_bits": 8}}, None, "a group's output_activations is"),
        ({"config_groups.group_0.format": "marlin-24"}, None, "a group's format is marlin-24"),
        ({f"{WEIGHTS}.block_structure": [128, 128]}, None, "weights: block_structure is"),
        ({"config_groups.group_0.input_activations": {"top_k": 4}}, None, "input_activations: top_k is 4"),
        ({}, {f"{Q}.weight_shape": torch.tensor([64, 32])}, "weight_shape is not"),
        ({}, {f"{Q}.weight_packed": torch.zeros(64, 8)}, "is torch.float32, this scheme asks for torch.int32"),
        ({}, {f"{Q}.weight_packed": torch.zeros(0)}, "weight_packed is missing"),
        ({}, {"model.norm.weight_scale": torch.zeros(1)}, "is no linear layer of this model"),
        ({}, {f"{Q}.strange": torch.zeros(1)}, "unexpected model.layers.0.self_attn.q_proj.strange"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], tensors: dict[str, Tensor] | None, message: str
) -> None:
    folder = make_quantized(tmp_path, SCHEMES["int4"])
    rewrite(folder, change, tensors)
    with pytest.raises(FormatError, match=message) as caught:
        hf.load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_changes_no_number_is_read(tmp_path: Path) -> None:
    """As tools of several years write it, and their values that mean nothing."""
    folder = make_quantized(tmp_path, SCHEMES["int4"])
    expected = hf.load_model(folder).state_dict()
    quiet = {"observer": "minmax", "observer_kwargs": {"a": 1}, "block_structure": None, "zp_dtype": "torch.int8"}
    rewrite(
        folder,
        {
            "version": "0.13.0",
            "global_compression_ratio": 1.4,
            "transform_config": {"config_groups": {}},
            "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "ignore": [], "targets": []},
            "moe_sparsity_config": None,
            "config_groups.group_0.format": "pack-quantized",
            **{f"{WEIGHTS}.{key}": value for key, value in quiet.items()},
        },
    )
    found = hf.load_model(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_cache_that_is_not_rounded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # libraries raise it
    folder = make_quantized(tmp_path, SCHEMES["int4"])
    hf.load_model(folder)
    assert not caplog.records
    rewrite(folder, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    for _ in range(2):
        hf.load_model(folder)
    (record,) = caplog.records  # once
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"{folder}: keys and values are not rounded here, as its kv_cache_scheme has it"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"x" * 5000, "no state of nf4"),
        (json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [1, 2]}).encode(), "shape is"),
        (json.dumps({"quant_type": "fp4", "blocksize": 64, "shape": [64, 64]}).encode(), "quant_type is 'fp4'"),
    ],
)
def test_broken_nf4_states_are_refused(tmp_path: Path, state: bytes, message: str) -> None:
    folder = make_quantized(tmp_path, Nf4Weights())
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    rewrite(folder, {}, {name: torch.frombuffer(bytearray(state), dtype=torch.uint8)})
    with pytest.raises(FormatError, match=message):
        hf.load_model(folder)


@pytest.mark.parametrize(
    ("tensors", "nested", "message"),
    [
        ({"absmax": torch.zeros(8)}, {}, "this scheme asks for"),
        ({"absmax": torch.zeros(64, dtype=torch.float16)}, {}, "is torch.float16"),
        ({"quant_map": torch.zeros(16)}, {}, "other levels than nf4's"),
        ({"absmax": torch.zeros(64, dtype=torch.uint8)}, {}, "lacks its block size"),
        (
            {
                "absmax": torch.zeros(64, dtype=torch.uint8),
                "nested_quant_map": torch.zeros(16),
                "nested_absmax": torch.zeros(1),
            },
            {"nested_blocksize": 2**50, "nested_offset": 0.0},
            r"has the shape \[16\], this scheme asks for \[256\]",
        ),
    ],
    ids=["too few", "another type", "another codebook", "no block size", "a huge block"],
)
def test_scales_of_nf4_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], nested: dict[str, Any], message: str
) -> None:
    folder = make_quantized(tmp_path, Nf4Weights())
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [64, 64], **nested}).encode()
    named = {f"{Q}.weight.{name}": tensor for name, tensor in tensors.items()}
    named[f"{Q}.weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    rewrite(folder, {}, named)
    with pytest.raises(FormatError, match=message):
        hf.load_model(folder)


def test_config_says_quantized_but_nothing_is(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, SCHEMES["int8"])
    shutil.copy(tmp_path / "plain/model.safetensors", folder / "model.safetensors")
    with pytest.raises(FormatError, match="no tensor is quantized"):
        hf.load_model(folder)
    with pytest.raises(FormatError, match="quantized already"):
        hf.load_model(make_quantized(tmp_path / "other", SCHEMES["int8"]), scheme=Nf4Weights())
