"""Paddle folders against PaddleNLP itself: what its own code built, saved and computed.

`paddlenlp.zip` in tests/fixtures/paddle was made by PaddleNLP 3.0.0b4 (`make_models.py` there). The weights of `plain` were
cut for four and for two processes, joined and split over a pipeline by PaddleNLP's functions.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM as LlamaForCausalLM_HF

from arriero.adapters.lora import apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.adapters.prefix import PrefixConfig, apply_prefix, load_prefix_state
from arriero.adapters.prefix_files import flatten
from arriero.formats.hf import save_model
from arriero.formats.paddle.lora import read_paddle_lora, write_paddle_lora
from arriero.formats.paddle.prefix import PaddlePrefix, read_paddle_prefix, write_paddle_prefix
from arriero.formats.paddle.reader import open_paddle
from arriero.formats.paddle.writer import write_paddle
from arriero.formats.peft_prefix import save_prefix
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.llama import LlamaForCausalLM

FIXTURES = Path(__file__).parent.parent / "fixtures" / "paddle"
PEERS_PYTHON = Path(__file__).parent.parent.parent / ".venv-peers" / "bin" / "python"
MODELS = {
    "plain": "plain",
    "tp4": "plain",
    "tp2_pp2_fused": "plain",
    "tied_bf16": "tied_bf16",
    "tied_bf16_unified": "tied_bf16",
    "qwen2": "qwen2",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paddlenlp")
    with zipfile.ZipFile(FIXTURES / "paddlenlp.zip") as archive:
        archive.extractall(folder)
    return folder


class OnlyArrays(pickle.Unpickler):
    """Python's machine, for files whose writer is known."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        return super().find_class(module, name)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = OnlyArrays(io.BytesIO(path.read_bytes())).load()
    return {name: value for name, value in state.items() if name != "StructuredToParameterName@@"}


def weights_of(folder: Path) -> dict[str, Tensor]:
    with open_paddle(folder) as source:
        return {
            name: (tensor.load() if isinstance(tensor, LazyTensor) else tensor).clone()
            for name, tensor in source.tensors.items()
        }


def model_of(folder: Path, weights: Path | None = None) -> LlamaForCausalLM:
    with open_paddle(folder) as source:
        model = LlamaForCausalLM(source.config)
    state = {name: tensor.float() for name, tensor in weights_of(weights or folder).items()}
    unset = model.load_state_dict(state, strict=False)
    assert set(unset.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def check_logits(root: Path, model: LlamaForCausalLM, name: str) -> None:
    expected = json.loads((root / "expected.json").read_text())
    with torch.no_grad():
        found = model(torch.tensor([expected["prompt"]]))[0, -3:]
    torch.testing.assert_close(found, torch.tensor(expected["logits"][name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_paddlenlp(root: Path, name: str) -> None:
    check_logits(root, model_of(root / name), MODELS[name])


def test_the_weights_are_those_of_the_file(root: Path) -> None:
    stored, found = arrays_of(root / "plain" / "model_state.pdparams"), weights_of(root / "plain")
    assert len(stored) == len(found)
    for name, array in stored.items():
        own = found[name.replace("llama.", "model.", 1)]
        turned = array.T if name.endswith(("proj.weight", "lm_head.weight")) else array
        np.testing.assert_array_equal(own.numpy(), turned)


@pytest.mark.parametrize("name", ["tp4", "tp2_pp2_fused"])
def test_the_parts_of_processes_join_to_the_whole(root: Path, name: str) -> None:
    whole, found = weights_of(root / "plain"), weights_of(root / name)
    assert found.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(found[key], tensor), key


def test_a_unified_checkpoint_is_the_sharded_one(root: Path) -> None:
    one, other = weights_of(root / "tied_bf16"), weights_of(root / "tied_bf16_unified")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(other[name], tensor)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic_ntk", "llama3"])
def test_rope_scaling_is_computed_as_paddlenlp_does(root: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(root / f"rope_{kind}", tmp_path / kind)
    shutil.copy(root / "plain" / "model_state.pdparams", tmp_path / kind)
    model = model_of(tmp_path / kind)
    check_logits(root, model, f"rope_{kind}")
    with open_paddle(tmp_path / kind) as source:
        write_paddle(source, tmp_path / "again")
    again = model_of(tmp_path / "again")
    assert again.config.rope_scaling == model.config.rope_scaling
    assert again.config.max_position_embeddings == model.config.max_position_embeddings
    check_logits(root, again, f"rope_{kind}")


def test_what_is_written_is_what_paddlenlp_wrote(root: Path, tmp_path: Path) -> None:
    for name, degree in (("plain", 1), ("tp4", 4)):
        with open_paddle(root / "plain") as source:
            write_paddle(source, tmp_path / name, tensor_parallel_degree=degree)
        files = sorted(path.name for path in (root / name).glob("*.pdparams"))
        assert sorted(path.name for path in (tmp_path / name).glob("*.pdparams")) == files
        for file in files:
            theirs, ours = arrays_of(root / name / file), arrays_of(tmp_path / name / file)
            assert ours.keys() == theirs.keys()
            for key, array in theirs.items():
                np.testing.assert_array_equal(ours[key], array)
                assert ours[key].dtype == array.dtype


@pytest.mark.parametrize("name", ["lora", "lora_tp2", "lora_fused"])
def test_an_adapter_computes_what_it_does_in_paddlenlp(root: Path, name: str) -> None:
    model = model_of(root / "plain")
    config, state = read_paddle_lora(root / name)
    apply_lora(model, from_peft(config))
    with torch.no_grad():
        load_adapter_state(model, state)
    check_logits(root, model.eval(), name.removesuffix("_tp2"))


@pytest.mark.parametrize(("name", "tp"), [("lora", 1), ("lora_tp2", 2)])
def test_an_adapter_is_written_as_paddlenlp_writes_it(root: Path, tmp_path: Path, name: str, tp: int) -> None:
    config, state = read_paddle_lora(root / "lora")
    with open_paddle(root / "plain") as source:
        write_paddle_lora(tmp_path / name, config, state, source.config, tp)
    for path in (root / name).glob("*.pdparams"):
        theirs, ours = arrays_of(path), arrays_of(tmp_path / name / path.name)
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_array_equal(ours[key], array)
    theirs, ours = (json.loads((folder / name / "lora_config.json").read_text()) for folder in (root, tmp_path))
    for key in ("r", "lora_alpha", "scaling", "rslora", "dtype", "lora_dropout", "trainable_bias"):
        assert ours[key] == theirs[key]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    again = read_paddle_lora(tmp_path / name)
    assert again[0].target_modules == config.target_modules
    assert all(torch.equal(again[1][key], tensor) for key, tensor in state.items())


PREFIXES = ["prefix", "prefix_tp2", "prefix_projection", "prefix_projection_tp2"]


def with_prefix(model: LlamaForCausalLM, prefix: PaddlePrefix) -> LlamaForCausalLM:
    config = prefix.config
    apply_prefix(model, PrefixConfig(config.num_virtual_tokens, config.prefix_projection, config.encoder_hidden_size))
    load_prefix_state(model, prefix.state)
    return model.eval()


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_computes_what_it_does_in_paddlenlp(root: Path, name: str) -> None:
    model = model_of(root / "plain")
    check_logits(root, with_prefix(model, read_paddle_prefix(root / name, model.config)), name)


@pytest.mark.parametrize("name", ["prefix", "prefix_projection"])
def test_the_caches_of_a_prefix_are_its_keys_and_values(root: Path, tmp_path: Path, name: str) -> None:
    for file in ("prefix_config.json", "pre_caches.npy"):
        shutil.copy(root / name / file, tmp_path)
    model = model_of(root / "plain")
    cached = read_paddle_prefix(tmp_path, model.config)
    assert not cached.config.prefix_projection
    check_logits(root, with_prefix(model, cached), name)


@pytest.mark.parametrize("name", ["prefix", "prefix_projection"])
def test_a_prefix_computes_the_same_in_peft(root: Path, tmp_path: Path, name: str) -> None:
    model = model_of(root / "plain")
    save_model(model, model.config, tmp_path / "base")
    prefix = read_paddle_prefix(root / name, model.config)
    save_prefix(tmp_path / "peft", prefix.state, prefix.config, lambda reader: flatten(reader, 2))
    theirs = PeftModel.from_pretrained(LlamaForCausalLM_HF.from_pretrained(tmp_path / "base"), str(tmp_path / "peft"))
    expected = json.loads((root / "expected.json").read_text())
    with torch.no_grad():
        found = theirs(torch.tensor([expected["prompt"]])).logits[0, -3:]
    torch.testing.assert_close(found, torch.tensor(expected["logits"][name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_is_written_as_paddlenlp_writes_it(root: Path, tmp_path: Path, name: str) -> None:
    with open_paddle(root / "plain") as source:
        model = source.config
    prefix, tp = read_paddle_prefix(root / name, model), 2 if name.endswith("_tp2") else 1
    write_paddle_prefix(tmp_path / name, prefix.config, prefix.state, model, tp=tp, dropout=prefix.dropout)
    for path in (root / name).glob("*.pdparams"):
        theirs, ours = arrays_of(path), arrays_of(tmp_path / name / path.name)
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            assert ours[key].shape == array.shape
            np.testing.assert_allclose(ours[key], array, rtol=1e-6, atol=1e-6)  # keys were rotated, and back
    theirs, ours = (json.loads((folder / name / "prefix_config.json").read_text()) for folder in (root, tmp_path))
    assert {key: max(value, 1) if key == "tensor_parallel_degree" else value for key, value in theirs.items()} == {
        key: max(value, 1) if key == "tensor_parallel_degree" else value for key, value in ours.items()
    }
    if (root / name / "pre_caches.npy").is_file():
        caches = [np.load(folder / name / "pre_caches.npy", allow_pickle=False) for folder in (root, tmp_path)]
        np.testing.assert_allclose(caches[1], caches[0], rtol=1e-6, atol=1e-6)


LOAD_WITH_PADDLE = """
import sys, glob, numpy as np, paddle
for path in sys.argv[2:]:
    np.savez(sys.argv[1] + "/" + path.rsplit("/", 1)[1] + ".npz", **{k: v.numpy() for k, v in paddle.load(path).items()})
"""

# A plain decoder's checkpoint of Paddle's own layers: their names, layouts and bytes are Paddle's, whatever PaddleNLP does.
SAVE_WITH_PADDLE = """
import sys, paddle
from paddle import nn
class Part(nn.Layer):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_sublayer(name, part)
def linear(i, o): return nn.Linear(i, o, bias_attr=False)
def layer():
    attention = Part(q_proj=linear(16, 16), k_proj=linear(16, 8), v_proj=linear(16, 8), o_proj=linear(16, 16))
    mlp = Part(gate_proj=linear(16, 24), up_proj=linear(16, 24), down_proj=linear(24, 16))
    norm = lambda: Part_norm()
    return Part(self_attn=attention, mlp=mlp, input_layernorm=norm(), post_attention_layernorm=norm())
class Part_norm(nn.Layer):
    def __init__(self):
        super().__init__()
        self.weight = self.create_parameter([16])
paddle.seed(7)
paddle.set_default_dtype(sys.argv[2])
decoder = Part(embed_tokens=nn.Embedding(40, 16), layers=nn.LayerList([layer(), layer()]), norm=Part_norm())
model = Part(llama=decoder, lm_head=linear(16, 40))
paddle.save(model.state_dict(), sys.argv[1] + "/model_state.pdparams")
x = paddle.randn([3, 16]).astype("float32")
out = lambda l: paddle.matmul(x, l.weight.astype("float32"))
import numpy as np
up, head = out(decoder.layers[1].mlp.up_proj), out(model.lm_head)
np.savez(sys.argv[1] + "/products.npz", x=x.numpy(), up=up.numpy(), head=head.numpy())
"""


def run_paddle(*arguments: str | Path) -> None:
    if not PEERS_PYTHON.is_file():
        pytest.fail(f"{PEERS_PYTHON} is missing: `make test-peers` makes it and installs Paddle there")
    done = subprocess.run(
        [PEERS_PYTHON, *map(str, arguments)], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.peers
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_paddle_loads_what_we_write(root: Path, tmp_path: Path, degree: int) -> None:
    name = "tp4" if degree == 4 else "plain"
    with open_paddle(root / "tied_bf16") as source:
        write_paddle(source, tmp_path / "bf16", tensor_parallel_degree=degree)
    with open_paddle(root / "plain") as source:
        write_paddle(source, tmp_path / "fp32", tensor_parallel_degree=degree)
    for kind in ("bf16", "fp32"):
        files = sorted((tmp_path / kind).glob("*.pdparams"))
        run_paddle("-c", LOAD_WITH_PADDLE, tmp_path / kind, *files)
        for path in files:
            loaded = np.load(path.with_name(path.name + ".npz"))
            stored = arrays_of(root / name / path.name) if kind == "fp32" and degree != 2 else arrays_of(path)
            assert set(loaded.files) == set(stored)
            for key, array in stored.items():
                np.testing.assert_array_equal(loaded[key], array)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_read_what_paddle_saves(root: Path, tmp_path: Path, dtype: str) -> None:
    config = json.loads((root / "plain" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    run_paddle("-c", SAVE_WITH_PADDLE, tmp_path, dtype)
    found, stored = weights_of(tmp_path), arrays_of(tmp_path / "model_state.pdparams")
    assert {name.replace("llama.", "model.", 1) for name in stored} == set(found)
    for name, array in stored.items():
        own = found[name.replace("llama.", "model.", 1)]
        turned = array.T if name.endswith(("proj.weight", "lm_head.weight")) else array
        np.testing.assert_array_equal(own.view(torch.uint16) if dtype == "bfloat16" else own, turned)
    products = np.load(tmp_path / "products.npz")
    x = torch.from_numpy(products["x"])
    for key, name in (("up", "model.layers.1.mlp.up_proj.weight"), ("head", "lm_head.weight")):
        ours = torch.nn.functional.linear(x, found[name].float())
        torch.testing.assert_close(ours, torch.from_numpy(products[key]), rtol=1e-5, atol=1e-5)
