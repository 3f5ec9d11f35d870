"""Our GGUF files in llama.cpp itself: the same ids, the same greedy answers, the same bytes as its own quantiser.

llama-cpp-python takes long to build, so it lives in an environment of its own (`.venv-peers`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")

from arriero.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from arriero.engine.sampling_params import SamplingParams  # noqa: E402
from arriero.engine.shared_generation import generate_shared  # noqa: E402
from arriero.formats.gguf.lora import write_gguf_lora  # noqa: E402
from arriero.formats.gguf.model import open_gguf  # noqa: E402
from arriero.formats.gguf.model_writer import write_gguf  # noqa: E402
from arriero.formats.gguf.tensor_types import KINDS  # noqa: E402
from arriero.formats.hf import load_model, open_state  # noqa: E402
from arriero.formats.peft import PeftLoraConfig  # noqa: E402
from arriero.formats.side_files import read_side_files  # noqa: E402
from arriero.formats.source import ModelSource  # noqa: E402
from arriero.formats.tiny_model import tiny_tokenizer_files  # noqa: E402
from arriero.models.config import LlamaConfig  # noqa: E402
from arriero.models.llama import LlamaForCausalLM  # noqa: E402
from arriero.models.weight_shapes import weight_shapes  # noqa: E402

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
TEXTS = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "tinyshakespeare.txt"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = ["Gravity is", "Once upon a time there was", "def fibonacci(n):\n", "1, 2, 3, 4,"]
NEW_TOKENS = 32

pytestmark = pytest.mark.peers


def llama_cpp(**request: Any) -> dict[str, Any]:
    assert PYTHON.is_file(), f"{PYTHON} is missing: `make test-peers` installs llama.cpp there"
    result = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("llama_cpp_answers.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [*(tokenizer.encode(text) for text in PROMPTS), tokenizer.chat(MESSAGES)]


def folder_source(folder: Path) -> ModelSource:
    config = LlamaConfig.from_file(folder)
    return ModelSource(folder, "hf", config, open_state(folder, config), read_side_files(folder))


@pytest.fixture(scope="module")
def write(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    target = tmp_path_factory.mktemp("gguf")

    def make(kind: str) -> Path:
        path = target / f"{kind}.gguf"
        if not path.exists():
            with folder_source(smollm2) as source:
                write_gguf(source, path, kind=kind)
        return path

    return make


def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return [answer.token_ids for answer in generate_shared(model, tokenizer, prompts, [params] * len(prompts))]


def test_answers_ids_and_chat_of_smollm2(
    smollm2: Path, write: Callable[[str], Path], tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    lines = TEXTS.read_text(encoding="utf-8").splitlines()[:10_000] if TEXTS.is_file() else []
    texts = [*(line for line in lines if line), "naïve — 漢字 🚀 12345 ½", "  x\t y\n\n\n z  ", "<|im_start|>user"]
    found = llama_cpp(model=str(write("f32")), prompts=prompts, tokens=NEW_TOKENS, texts=texts, messages=MESSAGES)
    assert found["answers"] == greedy(load_model(smollm2), tokenizer, prompts)
    assert found["ids"] == tokenizer.encode_batch(texts)
    assert found["chat"] == tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0", "q4_0", "q4_1", "q4_k_m"])
def test_other_kinds_load_and_answer(write: Callable[[str], Path], tokenizer: Tokenizer, kind: str) -> None:
    """llama.cpp rounds what goes into a quantised matrix to 8 bits, so of these files only a sure answer is the same."""
    ids = tokenizer.encode("1, 2, 3, 4, 5, 6,")
    found = llama_cpp(model=str(write(kind)), prompts=[ids], tokens=9)
    assert tokenizer.decode(found["answers"][0]) == " 7, 8, 9,"


def test_a_lora_file_answers_as_the_merged_model(
    smollm2: Path, write: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    config = PeftLoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=("q_proj", "k_proj", "v_proj", "up_proj"),
        use_rslora=True,
        alpha_pattern={"k_proj": 4.0},
    )
    model = load_model(smollm2, torch.float32)
    plain = greedy(model, tokenizer, prompts)
    generator, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        kind = layer.rpartition(".")[2]
        if kind in config.target_modules:
            a = torch.randn(4, parameter.shape[1], generator=generator) * 0.02
            b = torch.randn(parameter.shape[0], 4, generator=generator) * 0.02
            state |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            scale = (4.0 if kind == "k_proj" else 8.0) / 2.0  # rsLoRA: the square root of the rank
            parameter.data = parameter.data + scale * (b @ a)
    write_gguf_lora(tmp_path / "lora.gguf", config, state, model.config)
    merged = greedy(model, tokenizer, prompts)
    assert merged != plain
    found = llama_cpp(model=str(write("f32")), lora=str(tmp_path / "lora.gguf"), prompts=prompts, tokens=NEW_TOKENS)
    assert found["answers"] == merged


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("f32", "bf16")])
def test_bytes_of_llama_quantize(tmp_path: Path, kind: str) -> None:
    """Every tensor in the type that `llama-quantize` chooses, and byte for byte what it writes."""
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in weight_shapes(config).items()}
    source = ModelSource(tmp_path / "m", "hf", config, tensors, tiny_tokenizer_files())
    write_gguf(source, tmp_path / "f32.gguf", kind="f32")
    write_gguf(source, tmp_path / "ours.gguf", kind=kind)
    request = {"quantize": str(tmp_path / "f32.gguf"), "target": str(tmp_path / "theirs.gguf")}
    assert llama_cpp(**request, file_type=KINDS[kind].file_type)["failed"] == 0
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(ours[name].data, tensor.data), name


def test_there_and_back_is_the_same_model(smollm2: Path, write: Callable[[str], Path]) -> None:
    with folder_source(smollm2) as original, open_gguf(write("f32")) as again:
        assert again.config.to_dict() == replace(original.config, dtype="float32").to_dict()
        assert again.tensors.keys() == original.tensors.keys()
        for name, tensor in original.tensors.items():
            back = again.tensors[name]
            assert torch.equal(back if isinstance(back, Tensor) else back.load(), tensor), name  # type: ignore[arg-type]
