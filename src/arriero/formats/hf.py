"""The HF model folder: config.json, safetensors weights, tokenizer and licence beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arriero.config.model import DTYPES as NAMES
from arriero.errors import FormatError
from arriero.formats.name_list import listed
from arriero.formats.parts import Part
from arriero.formats.quantized import MARKS, QuantizedFolder, is_quantized, plain
from arriero.formats.safe_tensors import (
    WEIGHT_FILES,
    LazyTensor,
    parse_size,
    read_shapes,
    read_tensors,
    weight_files,
)
from arriero.formats.shared_files import ALONE, PartReader, Peers, State, agree, shared_folder, write_tensors
from arriero.formats.side_files import copy_side_files
from arriero.formats.tensor_shards import ShardedState, is_sharded
from arriero.formats.tied_head import read_config, untied
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.rope import RotaryEmbedding
from arriero.models.weight_shapes import weight_shapes
from arriero.quantization.linear import linear_layers, quantize_layers, quantize_weight
from arriero.quantization.schemes import WeightScheme

__all__ = [
    "check_state",
    "copy_side_files",
    "empty_model",
    "load_model",
    "load_state",
    "open_parts",
    "open_state",
    "parse_dtype",
    "parse_size",
    "save_model",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by its name ("bfloat16", "bf16"); None stays None.

    Raises:
        FormatError: for another name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    found = DTYPES.get(NAMES.get(name, name))
    if found is None:
        raise FormatError(f"the dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_state(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model folder, by name, one at a time; shards of tensor parallelism are joined.

    On the CPU without a cast, a tensor is a view of the mapped file (copy-on-write): it takes no memory of its own, unless
    it was joined. Quantized weights are dequantized, into `dtype` or that of config.json.

    Args:
        dtype: to cast floating-point tensors to; None keeps the file's.

    Raises:
        FormatError: for a missing, truncated or corrupt file, or a tensor that two files hold.
    """
    wanted = parse_dtype(dtype)
    if is_sharded(folder):
        shards = ShardedState(folder, LlamaConfig.from_file(folder))
        for name in shards.shapes:
            yield name, shards.read(name).to(device=device, dtype=wanted)
        return
    quantized = _quantized_folder(Path(folder))
    if quantized is not None:
        kind = wanted or quantized.model_dtype
        for name in quantized.plain_shapes():
            yield name, quantized.dequantized(name, kind).to(device=device, dtype=wanted)
        return
    seen: dict[str, Path] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path, device):
            if name in seen:
                raise FormatError(f"{path}: holds {name}, which {seen[name].name} holds too; fetch the model again")
            seen[name] = path
            yield name, tensor.to(wanted) if wanted is not None and tensor.dtype.is_floating_point else tensor


def open_state(folder: str | Path, config: LlamaConfig) -> dict[str, Tensor | LazyTensor]:
    """Every weight of a model folder, by name, none of it in memory yet: mapped, or joined of shards or dequantized when it
    is loaded.

    Raises:
        FormatError: as `load_model`.
    """
    if is_sharded(folder):
        return dict(ShardedState(folder, config).lazy())
    check_state(config, {name: shape for name, (_, shape) in _stored(Path(folder), config).items()}, str(folder))
    quantized = _quantized_folder(Path(folder))
    return quantized.lazy() if quantized is not None else dict(load_state(folder))


def _quantized_folder(folder: Path) -> QuantizedFolder | None:
    """What reads a folder whose config.json says that layers are quantized; None for a plain one."""
    if not (folder / "config.json").is_file():  # bare weights
        return None
    config = read_config(folder)
    return QuantizedFolder(folder, config) if is_quantized(config) else None


def _stored(folder: Path, config: LlamaConfig) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype and shape of every plain weight of a model folder; the dtype of one that is quantized, or carries nothing, is
    None.
    """
    if is_sharded(folder):
        shards = ShardedState(folder, config)
        return {name: (shards.dtype(name), shape) for name, shape in shards.shapes.items()}
    quantized = _quantized_folder(folder)
    if quantized is not None:
        plain_shapes = quantized.plain_shapes()
        return {name: (quantized.plain_dtype(name), shape) for name, shape in plain_shapes.items()}
    found = {}
    for path in weight_files(folder):
        for name, (kind, shape) in read_shapes(path).items():
            if kind is None and not _ignored(name, config):
                raise FormatError(f"{path}: {name} is not a float16, bfloat16, float32 or float64 tensor")
            found[name] = (kind, shape)
    return found


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: LlamaConfig | None = None,
    scheme: WeightScheme | None = None,
) -> LlamaForCausalLM:
    """The model of an HF folder, or of one of shards, in evaluation mode.

    Quantized layers stay so.

    It is built without memory and the mapped tensors become its parameters, so nothing is held twice; on the CPU
    without a cast the weights are read from disk only as they are used.

    Args:
        dtype: of all parameters; None keeps the file's (that of config.json if the file mixes several).
        config: instead of the folder's config.json.
        scheme: to quantize the linear layers of a plain folder with as they are read, one weight at a time.

    Raises:
        FormatError: naming every tensor that is missing, unexpected, or of a wrong shape or dtype.
    """
    folder, wanted = Path(folder), parse_dtype(dtype)
    model, stored = empty_model(folder, wanted, config, scheme)
    config = model.config
    if wanted is None and len(stored) > 1:
        wanted = parse_dtype(config.dtype) or torch.float32
    quantized = _quantized_folder(folder)
    if quantized is not None:
        state = {name: tensor for name, tensor in quantized.state(wanted, device) if not _ignored(name, config)}
    else:
        layers = linear_layers(config) if scheme is not None else {}
        state = {}
        for name, tensor in load_state(folder, wanted if scheme is None else None, device):
            layer = name.removesuffix(".weight")
            if scheme is not None and layer in layers and layer != name:
                state |= {f"{layer}.{part}": stored for part, stored in quantize_weight(name, tensor, scheme).items()}
            elif not _ignored(name, config):
                # beside quantized layers a copy, so that the mapped file, which is much larger, can go
                state[name] = tensor.to(dtype=wanted, copy=scheme is not None)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.to_empty(device=device)
            module.reset()
    leftover = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if leftover:
        raise FormatError(f"{folder}: {listed(leftover)} got no value; fetch the model again")
    return model.eval()


def empty_model(
    folder: Path, dtype: torch.dtype | None, config: LlamaConfig | None = None, scheme: WeightScheme | None = None
) -> tuple[LlamaForCausalLM, set[torch.dtype]]:
    """The model of a folder on the meta device, after every check that needs no weights; and the dtypes that are stored.

    Args:
        dtype: of all parameters; None takes the file's (that of config.json if the file mixes several).
        scheme: of its linear layers, for a folder of plain weights.

    Raises:
        FormatError: as `load_model`.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; give a model folder or see `arriero download --help`")
    config = untied(config, folder) if config is not None else read_config(folder)
    stored = _stored(folder, config)
    check_state(config, {name: shape for name, (_, shape) in stored.items()}, str(folder))
    check_vocabulary(folder, config)
    kinds = {kind for kind, _ in stored.values() if kind is not None}
    if dtype is None:
        dtype = parse_dtype(config.dtype) or torch.float32 if len(kinds) > 1 else next(iter(kinds))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype)
    quantized = _quantized_folder(folder)
    if quantized is not None and scheme is not None:
        raise FormatError(f"{folder}: its weights are quantized already; leave out --quantize_base")
    if quantized is not None:
        quantized.prepare(model)
    elif scheme is not None:
        layers = linear_layers(config)
        quantize_layers(model, lambda name, _: scheme if name in layers else None)
    return model, kinds


def open_parts(folder: str | Path, config: LlamaConfig) -> PartReader | ShardedState | QuantizedFolder:
    """What reads boxes of the weights of a folder."""
    quantized = None if is_sharded(folder) else _quantized_folder(Path(folder))
    if quantized is not None:
        return quantized
    return ShardedState(folder, config) if is_sharded(folder) else PartReader(folder)


def check_state(config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare the names and shapes of a set of weights with those that a configuration needs.

    Raises:
        FormatError: naming what is missing, unexpected or mis-shaped.
    """
    # Before building anything: a hostile number of layers would take minutes even without memory.
    if config.num_hidden_layers > len(shapes):
        raise FormatError(
            f"{source}: {config.num_hidden_layers} layers are announced, but there are only {len(shapes)} tensors"
        )
    expected = weight_shapes(config)
    missing = [name for name in expected if name not in shapes]
    if missing:
        hint = "; set tie_word_embeddings in config.json if the head is the embedding" if missing == [_HEAD] else ""
        raise FormatError(f"{source}: missing {listed(missing)} (config.json needs it){hint}")
    unexpected = [name for name in shapes if name not in expected and not _ignored(name, config)]
    if unexpected:
        raise FormatError(f"{source}: unexpected {listed(unexpected)}; config.json does not describe these weights")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise FormatError(
                f"{source}: {name} has the shape {list(shapes[name])}, config.json asks for {list(shape)}"
            )


def save_model(
    model_or_state: nn.Module | State,
    config: LlamaConfig,
    folder: str | Path,
    max_shard_size: str | int = "5GB",
    dtype: str | torch.dtype | None = None,
    extra_files_from: str | Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    peers: Peers = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an HF folder that transformers and this package read, as a whole or not at all.

    Weights of the folder that the new ones stand for are removed; its other files stay.

    Args:
        model_or_state: a model, or its weights by name. A tied output head is left out. Of a model with quantized layers:
            `arriero.formats.quantized.file_state`, and a configuration that says so.
        max_shard_size: largest size of one weight file, e.g. "5GB".
        dtype: to cast to; None keeps each tensor's.
        extra_files_from: a model folder whose tokenizer, generation defaults and licence are copied.
        extra_files: more files by name, e.g. a tokenizer's; they win over copied ones.
        peers: the processes that hold the weights together; every one calls this with its own parts. The files beside the
            weights are those that the first asks for.
        progress: told bytes done and bytes in all, after each tensor of this process.

    Raises:
        FormatError: when the weights do not fit the configuration, or something cannot be written (a full disk, say).
        PeerError: when it went wrong in another process.
    """
    folder = Path(folder)
    limit, wanted = parse_size(max_shard_size), parse_dtype(dtype)
    state: dict[str, Tensor | LazyTensor | Part]
    state = dict(model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state)
    if config.tie_word_embeddings and _HEAD in state:
        _check_tied(state)
        del state[_HEAD]
    plan = agree(state, peers, wanted)
    quantized = is_quantized(config) and any(name.endswith(MARKS) for name in plan)
    if not quantized:
        config = plain(config)
        check_state(config, {name: shape for name, (_, shape) in plan.items()}, "the weights to save")
        # One file must state one dtype: that of the matrices if the model says so; else the widest describes a mixture best.
        kinds, matrices = ({kind for kind, shape in plan.values() if len(shape) > least} for least in (0, 1))
        stated = parse_dtype(config.dtype)
        chosen = stated if stated in matrices and len(matrices) == 1 else max(kinds, key=lambda kind: kind.itemsize)
        config = dataclasses.replace(config, dtype=dtype_name(chosen))
    # What is made when it is written comes in the order that is easiest for its maker.
    order = () if any(isinstance(value, LazyTensor) for value in state.values()) else tuple(weight_shapes(config))
    with shared_folder(folder, peers, replaces=WEIGHT_FILES) as staging:
        write_tensors(state, staging, max_shard_size=limit, dtype=wanted, peers=peers, order=order, progress=progress)
        with peers.together():
            if peers.first:
                _write_side_files(config, staging, folder, extra_files_from, extra_files or {})
                if quantized:
                    QuantizedFolder(staging, config)  # refuses what does not fit together


def _write_side_files(
    config: LlamaConfig,
    staging: Path,
    folder: Path,
    extra_files_from: str | Path | None,
    extra_files: Mapping[str, bytes],
) -> None:
    if extra_files_from is not None:
        copy_side_files(extra_files_from, staging)
    for name, content in extra_files.items():
        (staging / name).write_bytes(content)
    if not (staging / "generation_config.json").exists() and not (folder / "generation_config.json").exists():
        (staging / "generation_config.json").write_text(_json(_generation_config(config)), encoding="utf-8")
    (staging / "config.json").write_text(_json(config.to_dict()), encoding="utf-8")


def _generation_config(config: LlamaConfig) -> dict[str, Any]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    ids["pad_token_id"] = config.pad_token_id
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}


def _check_tied(state: Mapping[str, Tensor | LazyTensor | Part]) -> None:
    head, embedding = state[_HEAD], state.get(_EMBEDDING)
    if not isinstance(head, Tensor) or not isinstance(embedding, Tensor) or head.data_ptr() == embedding.data_ptr():
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise FormatError(f"{_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings is set; the head would be lost")


def check_vocabulary(folder: Path, config: LlamaConfig) -> None:
    """Refuse a tokenizer that produces ids the embedding does not have."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        values: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON; fetch it again") from error
    model = values.get("model") if isinstance(values, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = values.get("added_tokens") if isinstance(values, dict) else None
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids += list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1] if isinstance(vocab, list) else []
    largest = max((index for index in ids if isinstance(index, int)), default=-1)
    if largest >= config.vocab_size:
        raise FormatError(
            f"{path}: has a token with the id {largest}, but the model's vocab_size is {config.vocab_size}; "
            "this tokenizer belongs to another model"
        )


def _ignored(name: str, config: LlamaConfig) -> bool:
    """Tensors that carry nothing: RoPE frequencies of old checkpoints, the copy of a tied head (see `tied_head.py`)."""
    return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tie_word_embeddings)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
