"""Prefixes in PaddleNLP's files: `prefix_config.json`, `prefix_model_state[.tpNN].pdparams` and `pre_caches.npy`.

A prefix is (P, 2 * layers * width), width = key-value heads * head size: the keys of all layers, then the values of all. It is
an embedding's weight, or what a small network makes: embedding, linear, tanh, linear (paddlenlp/peft/prefix/prefix_model.py).
`pre_caches.npy` is the result, (layers, 2, heads, P, head size).

Keys of a prefix get no rotary position, here and there; but tokens are counted from 0 behind a prefix in PaddleNLP's LLaMA and
Qwen2 (`LlamaModel.forward`: position_ids), and from P here, in PEFT and in PaddleNLP's Mistral. A score depends on the
difference of two rotations, so keys that are rotated by P positions give the same numbers: they are on the way in, and back
on the way out. A network's last layer is rotated in their place.

Under tensor parallelism PaddleNLP gives process r the r-th run of these columns and reads it as (2 * layers, heads / degree,
head size), so the columns mean something else there than in one process. Files of processes are read and written in that
order. A prefix that PaddleNLP trained so and merged itself is out of order, which no file tells, for PaddleNLP as for us.
"""

from __future__ import annotations

import json
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object
from arriero.formats.paddle.checkpoint import Piece, find_adapter_files, open_adapter_files, tensor_dtype
from arriero.formats.paddle.names import base_prefix
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.paddle.prefix_shape import EMBEDDING, PrefixShape
from arriero.formats.peft_prefix import PeftPrefixConfig
from arriero.formats.staging import staged_folder
from arriero.models.config import LlamaConfig
from arriero.models.config_reader import ConfigReader
from arriero.models.rope import rope_frequencies

PREFIX_CONFIG = "prefix_config.json"
PREFIX_STEM = "prefix_model_state"
CACHES = "pre_caches.npy"

# The axis that tensor parallelism cuts, in Paddle's layout.
_AXES = {"0.weight": 0, "1.weight": 1, "1.bias": 0, "3.weight": 0}
_ENCODER = "prefix_encoder"


@dataclass(frozen=True)
class PaddlePrefix:
    """A prefix in our terms.

    Attributes:
        config: in PEFT's words.
        state: the parameters, by the names that they have in a model with this prefix.
        dropout: of the prefix while it was trained.
    """

    config: PeftPrefixConfig
    state: dict[str, Tensor]
    dropout: float = 0.0


def is_paddle_prefix(folder: str | Path) -> bool:
    """Whether a folder holds a prefix as PaddleNLP saves it."""
    folder = Path(folder)
    return (folder / PREFIX_CONFIG).is_file() and (
        find_adapter_files(folder, PREFIX_STEM) or (folder / CACHES).is_file()
    )


def read_paddle_prefix(folder: str | Path, model: LlamaConfig) -> PaddlePrefix:
    """Read a prefix; the parts of the processes that saved it are joined. Where only `pre_caches.npy` is there, the keys and
    values themselves are read from it.

    Of a network whose embedding is narrower than the model (fewer key-value heads), embedding and matrix are widened by zeros:
    it computes the same, and the zeros stay zero in training.

    Args:
        model: that the prefix goes before.

    Raises:
        FormatError: when a file is missing or broken, its tensors are not those that the configuration describes, or it is for
            another model.
    """
    folder = Path(folder)
    values = read_json_object(folder / PREFIX_CONFIG, "a Paddle prefix folder needs it")
    reader = ConfigReader(values, str(folder / PREFIX_CONFIG))
    shape = PrefixShape.read(reader)
    shape.check_model(reader.source, model)
    if not find_adapter_files(folder, PREFIX_STEM) and (folder / CACHES).is_file():
        shape = replace(shape, projection_size=None)
        stored = _rotated({EMBEDDING: _read_caches(folder / CACHES, shape)}, shape, model, shape.length)
        return PaddlePrefix(_peft_config(shape), _ours(stored, shape))
    checkpoint = open_adapter_files(folder, PREFIX_STEM, reader.integer("tensor_parallel_degree", 1))
    try:
        wanted = shape.stored()
        odd = sorted(wanted.keys() ^ checkpoint.pieces.keys())
        if odd:
            state = "unexpected" if odd[0] in checkpoint.pieces else "missing"
            raise FormatError(
                f"{checkpoint.files[0]}: {state} {odd[0][:80]} ({PREFIX_CONFIG} describes {sorted(wanted)})"
            )
        stored = {name: _join(checkpoint.pieces[name], name, wanted[name]) for name in wanted}
        if checkpoint.tp > 1:
            shape.check_degree(checkpoint.tp)
            order = shape.order_of_processes(checkpoint.tp)
            stored |= {name: stored[name][..., order] for name in shape.output_tensors}
    finally:
        checkpoint.close()
    stored = _rotated({name: tensor.float() for name, tensor in stored.items()}, shape, model, shape.length)
    return PaddlePrefix(_peft_config(shape), _ours(stored, shape), reader.number("prefix_dropout", 0.0))


def write_paddle_prefix(
    folder: str | Path,
    config: PeftPrefixConfig,
    state: Mapping[str, Tensor],
    model: LlamaConfig,
    *,
    tp: int = 1,
    dropout: float = 0.0,
) -> None:
    """Write a prefix as PaddleNLP saves it, as a whole or not at all.

    A network is written as one only where the key-value heads are as wide as the model; PaddleNLP's is narrower elsewhere, so
    there the keys and values that it makes are written.

    Args:
        config: in PEFT's words.
        state: the parameters, by the names that they have in a model with this prefix.
        model: that the prefix goes before.
        tp: processes of tensor parallelism, one file each.
        dropout: of the prefix while it is trained.

    Raises:
        FormatError: for a prefix that cannot be cut into so many parts, or when something cannot be written.
    """
    base_prefix(model)
    head_dim = config.token_dim // config.num_attention_heads
    shape = PrefixShape(
        config.num_virtual_tokens, config.num_attention_heads, head_dim, config.num_layers, model.hidden_size, None
    )
    shape.check_model("the prefix", model)
    stored = _paddle_state(state, shape)
    if "1.weight" in stored:
        shape = replace(shape, projection_size=stored["1.bias"].shape[0])
    stored = _rotated(stored, shape, model, -shape.length)
    if tp > 1:
        shape.check_degree(tp)
        order = torch.argsort(shape.order_of_processes(tp))
    kind = str(stored[EMBEDDING].dtype).removeprefix("torch.")
    values = {
        "dtype": kind,
        "hidden_size": shape.hidden_size,
        "multi_query_group_num": shape.heads if shape.heads != model.num_attention_heads else None,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": shape.layers,
        "num_prefix_tokens": shape.length,
        "prefix_dropout": dropout,
        "prefix_projection": shape.projection_size is not None,
        "prefix_projection_hidden_size": shape.projection_size,
        "tensor_parallel_degree": tp if tp > 1 else -1,
    }
    with staged_folder(folder, replaces=(f"{PREFIX_STEM}*.pdparams", CACHES)) as staging:
        _write_caches(staging / CACHES, _flat(stored), shape)
        if tp > 1:
            stored |= {name: stored[name][..., order] for name in shape.output_tensors}
        for rank in range(tp):
            parts = {name: _part(tensor, name, tp, rank) for name, tensor in stored.items()}
            write_pdparams(staging / f"{PREFIX_STEM}{f'.tp{rank:02d}' if tp > 1 else ''}.pdparams", parts)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (staging / PREFIX_CONFIG).write_text(text, encoding="utf-8")


def _peft_config(shape: PrefixShape) -> PeftPrefixConfig:
    return PeftPrefixConfig(
        num_virtual_tokens=shape.length,
        token_dim=shape.width,
        num_attention_heads=shape.heads,
        num_layers=shape.layers,
        prefix_projection=shape.projection_size is not None,
        encoder_hidden_size=shape.projection_size,
    )


def _rotated(stored: dict[str, Tensor], shape: PrefixShape, model: LlamaConfig, positions: int) -> dict[str, Tensor]:
    """With the keys moved by a number of positions; see the top of this file."""
    if model.model_type == "mistral":
        return stored
    frequencies, _ = rope_frequencies(model)
    angles = positions * frequencies.double()
    cos, sin = angles.cos(), angles.sin()
    result = dict(stored)
    for name in shape.output_tensors:
        tensor = stored[name]
        keys, values = tensor.chunk(2, -1)
        first, second = keys.double().view(*keys.shape[:-1], shape.heads * shape.layers, 2, -1).unbind(-2)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2).flatten(-3)
        result[name] = torch.cat([turned.to(tensor.dtype), values], -1)
    return result


def _join(pieces: tuple[Piece, ...], name: str, wanted: tuple[int, ...]) -> Tensor:
    tensors = [piece.load(bfloat16=True) for piece in pieces]
    for piece in pieces:
        tensor_dtype(piece, name)
    axis = _AXES.get(name)
    if axis is not None and len({tensor.shape for tensor in tensors}) == 1 and tensors[0].dim() == len(wanted):
        whole = torch.cat(tensors, axis)
    else:
        whole = tensors[0].clone()  # small, and the file may be replaced
        for piece, tensor in zip(pieces[1:], tensors[1:], strict=True):
            if not torch.equal(tensor, whole):
                raise FormatError(f"{piece.path}: {name} differs from that in {pieces[0].path.name}")
    if tuple(whole.shape) != wanted:
        raise FormatError(
            f"{pieces[0].path}: {name} has the shape {list(whole.shape)}, {PREFIX_CONFIG} asks for {list(wanted)}"
        )
    return whole


def _part(tensor: Tensor, name: str, tp: int, rank: int) -> Tensor:
    axis = _AXES.get(name)
    return (tensor if axis is None or tp == 1 else tensor.chunk(tp, axis)[rank]).contiguous()


def _layer_name(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.self_attn.prefix.{kind}"


def _ours(stored: Mapping[str, Tensor], shape: PrefixShape) -> dict[str, Tensor]:
    """The parameters by their names in a model of ours, in torch's layout."""
    if shape.projection_size is None:
        found = {_layer_name(*at): stored[EMBEDDING][:, where] for at, where in shape.columns().items()}
    else:
        missing = shape.hidden_size - shape.width
        found = {
            f"{_ENCODER}.embedding.weight": F.pad(stored[EMBEDDING], (0, missing)),
            f"{_ENCODER}.linear.weight": F.pad(stored["1.weight"].t(), (0, missing)),
            f"{_ENCODER}.linear.bias": stored["1.bias"],
        }
        for at, where in shape.columns().items():
            found[f"{_layer_name(*at)}_proj.weight"] = stored["3.weight"][:, where].t()
            found[f"{_layer_name(*at)}_proj.bias"] = stored["3.bias"][where]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _paddle_state(state: Mapping[str, Tensor], shape: PrefixShape) -> dict[str, Tensor]:
    """The parameters by Paddle's names, in its layout; without the network where Paddle's could not hold it."""
    columns = shape.columns()
    at = sorted(columns, key=lambda key: columns[key].start)
    if f"{_ENCODER}.linear.weight" not in state:
        return {EMBEDDING: torch.cat([state[_layer_name(*key)] for key in at], 1)}
    stored = {
        EMBEDDING: state[f"{_ENCODER}.embedding.weight"],
        "1.weight": state[f"{_ENCODER}.linear.weight"].t(),
        "1.bias": state[f"{_ENCODER}.linear.bias"],
        "3.weight": torch.cat([state[f"{_layer_name(*key)}_proj.weight"].t() for key in at], 1),
        "3.bias": torch.cat([state[f"{_layer_name(*key)}_proj.bias"] for key in at]),
    }
    rest = stored[EMBEDDING][:, shape.width :], stored["1.weight"][shape.width :]
    if any(not part.any() for part in rest):  # as wide as Paddle's, or widened by zeros when it was read
        return stored | {
            EMBEDDING: stored[EMBEDDING][:, : shape.width],
            "1.weight": stored["1.weight"][: shape.width],
        }
    return {EMBEDDING: _flat(stored)}


def _flat(stored: Mapping[str, Tensor]) -> Tensor:
    """The prefix itself, (P, 2 * layers * width)."""
    if "1.weight" not in stored:
        return stored[EMBEDDING]
    return (stored[EMBEDDING] @ stored["1.weight"] + stored["1.bias"]).tanh() @ stored["3.weight"] + stored["3.bias"]


def _read_caches(path: Path, shape: PrefixShape) -> Tensor:
    """The columns of the prefix, of `pre_caches.npy`; what NumPy would unpickle is refused."""
    wanted = (shape.layers, 2, shape.heads, shape.length, shape.head_dim)
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise FormatError(f"{path}: is not a .npy file")
        caches: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    except (
        ValueError,
        SyntaxError,
        tokenize.TokenError,
        EOFError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise FormatError(f"{path}: is not a valid .npy file of numbers; fetch it again") from error
    if caches.dtype not in (np.float32, np.float16, np.float64, np.uint16) or not caches.dtype.isnative:
        raise FormatError(f"{path}: holds {caches.dtype}, no floating-point numbers")
    if caches.shape != wanted:
        raise FormatError(f"{path}: has the shape {list(caches.shape)}, {PREFIX_CONFIG} asks for {list(wanted)}")
    tensor = torch.from_numpy(np.array(caches))
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
    return tensor.float().permute(3, 1, 0, 2, 4).reshape(shape.length, -1)


def _write_caches(path: Path, flat: Tensor, shape: PrefixShape) -> None:
    caches = flat.detach().float().view(shape.length, 2, shape.layers, shape.heads, shape.head_dim)
    np.save(path, caches.permute(2, 1, 3, 0, 4).contiguous().numpy(), allow_pickle=False)
