"""Small honest files of every format, each with what reads them, for tests that break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.prefix_files import parameter_name
from arriero.formats.bin_folder import open_bin_folder
from arriero.formats.gguf.lora import read_gguf_lora, write_gguf_lora
from arriero.formats.gguf.model import open_gguf
from arriero.formats.gguf.model_writer import write_gguf
from arriero.formats.hf import save_model
from arriero.formats.hf_source import open_hf
from arriero.formats.meta.reader import open_meta
from arriero.formats.meta.writer import write_meta
from arriero.formats.paddle.lora import read_paddle_lora, write_paddle_lora
from arriero.formats.paddle.prefix import read_paddle_prefix, write_paddle_prefix
from arriero.formats.paddle.reader import open_paddle
from arriero.formats.paddle.writer import write_paddle
from arriero.formats.parts import Placement
from arriero.formats.peft import PeftLoraConfig, load_adapter, load_adapter_parts, save_adapter
from arriero.formats.peft_prefix import EMBEDDINGS, PeftPrefixConfig, open_embeddings, read_config, save_prefix
from arriero.formats.safe_tensors import LazyTensor, read_shapes, read_tensors
from arriero.formats.source import ModelSource
from arriero.formats.torch_files import read_torch_file
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

CONFIG = LlamaConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    max_position_embeddings=32,
)
LORA = PeftLoraConfig(r=2, lora_alpha=4.0, target_modules=("q_proj", "down_proj"))
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 15, "content": "<s>", "special": True, "single_word": False, "lstrip": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {**{chr(97 + i): i for i in range(14)}, "ab": 14}, "merges": [["a", "b"]]},
}


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(CONFIG).items()}


def source() -> ModelSource:
    files = {"tokenizer.json": json.dumps(TOKENIZER).encode(), "tokenizer_config.json": b'{"bos_token": "<s>"}'}
    return ModelSource(Path("honest"), "hf", CONFIG, state(), files)


def load_all(model: ModelSource) -> None:
    """Load every tensor of a model, and see that it is what was announced."""
    with model:
        for name, value in model.tensors.items():
            tensor = value.load() if isinstance(value, LazyTensor) else value
            assert tuple(tensor.shape) == tuple(value.shape), name
            assert tensor.dtype == value.dtype
            tensor.float().sum()


@dataclass(frozen=True)
class Honest:
    """A kind of file or folder.

    Attributes:
        make: writes one into an empty folder.
        read: reads all that is in it.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]


def _config_json(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))


def _make_bin(folder: Path) -> None:
    tensors = list(state().items())
    shards = {"pytorch_model-00001-of-00002.bin": tensors[:9], "pytorch_model-00002-of-00002.bin": tensors[9:]}
    for name, shard in shards.items():
        torch.save(dict(shard), folder / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key, _ in shard}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _config_json(folder)


def _make_safetensors(folder: Path) -> None:
    save_model(state(), CONFIG, folder / "x", max_shard_size=2_000)
    for path in (folder / "x").glob("*.safetensors"):
        path.replace(folder / path.name)
    for path in (folder / "x").iterdir():
        path.unlink()
    (folder / "x").rmdir()


def _read_safetensors(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        shapes = read_shapes(path)
        for name, tensor in read_tensors(path):
            assert tuple(tensor.shape) == shapes[name][1]
            tensor.float().sum()


def _lora_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (rows, columns) in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 12)}.items():
        for layer in range(CONFIG.num_hidden_layers):
            start = f"model.layers.{layer}.{name}.lora_"
            found[f"{start}A.weight"] = torch.randn(2, columns, generator=generator)
            found[f"{start}B.weight"] = torch.randn(rows, 2, generator=generator)
    return found


def _read_lora(folder: Path) -> None:
    load_adapter(folder)
    load_adapter_parts(folder, {name: Placement.whole(tensor.shape) for name, tensor in _lora_state().items()})


PREFIX = PeftPrefixConfig(num_virtual_tokens=3, token_dim=4, num_attention_heads=2, num_layers=2)


def _make_prefix(folder: Path) -> None:
    embeddings = torch.randn(3, 16)
    save_prefix(folder, {EMBEDDINGS: embeddings}, PREFIX, lambda reader: reader.read(EMBEDDINGS))


def _make_paddle_prefix(folder: Path, *, cached: bool) -> None:
    names = [parameter_name(layer, which) for layer in range(2) for which in ("key", "value")]
    write_paddle_prefix(folder, PREFIX, {name: torch.randn(3, 4) for name in names}, CONFIG)
    for path in folder.glob("*.pdparams") if cached else ():
        path.unlink()  # so that pre_caches.npy is read


def _read_prefix(folder: Path) -> None:
    config = read_config(folder)
    open_embeddings(folder, config).read(EMBEDDINGS)


FORMATS: dict[str, Honest] = {
    "hf": Honest(
        lambda folder: save_model(state(), CONFIG, folder, max_shard_size=2_000),
        lambda folder: load_all(open_hf(folder)),
    ),
    "safetensors": Honest(_make_safetensors, _read_safetensors),
    "torch": Honest(lambda folder: torch.save(state(), folder / "x.pth"), lambda f: read_torch_file(f / "x.pth")),
    "bin": Honest(_make_bin, lambda folder: load_all(open_bin_folder(folder))),
    "meta": Honest(
        lambda folder: write_meta(source(), folder, model_parallel_size=2), lambda folder: load_all(open_meta(folder))
    ),
    "paddle": Honest(
        lambda folder: write_paddle(source(), folder, max_shard_size=4_000),
        lambda folder: load_all(open_paddle(folder)),
    ),
    "paddle-ranks": Honest(
        lambda folder: write_paddle(source(), folder, tensor_parallel_degree=2, pipeline_parallel_degree=2),
        lambda folder: load_all(open_paddle(folder)),
    ),
    "paddle-lora": Honest(
        lambda folder: write_paddle_lora(folder, LORA, _lora_state(), CONFIG, tp=2),
        lambda folder: read_paddle_lora(folder),
    ),
    "peft-lora": Honest(lambda folder: save_adapter(folder, _lora_state(), LORA), _read_lora),
    "peft-prefix": Honest(_make_prefix, _read_prefix),
    "gguf": Honest(
        lambda folder: write_gguf(source(), folder / "x.gguf", kind="f32"),
        lambda folder: load_all(open_gguf(folder / "x.gguf")),
    ),
    "gguf-lora": Honest(
        lambda folder: write_gguf_lora(folder / "x.gguf", LORA, _lora_state(), CONFIG),
        lambda folder: read_gguf_lora(folder / "x.gguf", CONFIG),
    ),
    "paddle-prefix": Honest(
        lambda folder: _make_paddle_prefix(folder, cached=False), lambda folder: read_paddle_prefix(folder, CONFIG)
    ),
    "paddle-caches": Honest(
        lambda folder: _make_paddle_prefix(folder, cached=True), lambda folder: read_paddle_prefix(folder, CONFIG)
    ),
}
