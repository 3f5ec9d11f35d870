"""LoRA adapters in PaddleNLP's files: `lora_config.json` and `lora_model_state[.tpNN].pdparams`.

Paddle's A is [in, r] and its B [r, out], the transposes of PEFT's; the update is A B alpha / r in both (paddlenlp/peft/lora).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object
from arriero.formats.paddle.checkpoint import Checkpoint, Piece, find_adapter_files, open_adapter_files, tensor_dtype
from arriero.formats.paddle.config import paddle_config, paddle_config_of
from arriero.formats.paddle.names import (
    BASE_PREFIXES,
    FUSED_ROWS,
    HF_PREFIX,
    Place,
    base_prefix,
    places,
    row_of,
    tp_axis_of,
)
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.peft import PeftLoraConfig
from arriero.formats.peft_layers import targets_of
from arriero.formats.staging import staged_folder
from arriero.models.config import LlamaConfig
from arriero.models.config_reader import ConfigReader

LORA_CONFIG = "lora_config.json"
LORA_STEM = "lora_model_state"

_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])")
_OUR_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
# Switches of methods that compute something else than W + A B s, or that changed the base weights when they began.
_OTHER_METHODS = {
    "pissa": "PiSSA changed the base weights",
    "loraga": "LoRA-GA changed the base weights",
    "use_mora": "MoRA is another method",
    "lora_use_mixer": "MosLoRA has a third matrix",
    "do_qat": "its layers round their weights",
}
_BIASES = {None: "none", "lora": "lora_only", "all": "all"}
_MERGE = "merge it into its base model with PaddleNLP's merge_lora_params.py, and convert that"


def is_paddle_lora(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter as PaddleNLP saves it."""
    folder = Path(folder)
    return (folder / LORA_CONFIG).is_file() and find_adapter_files(folder, LORA_STEM)


def read_paddle_lora(folder: str | Path, model: LlamaConfig | None = None) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    """Read an adapter; the parts of the processes that saved it are joined.

    An adapter of layers that hold q, k and v (or gate and up) together becomes adapters of these with the same A.

    Args:
        model: the base model, for the number of its heads; else the `config.json` in the folder tells, which PaddleNLP writes
            since 2.7. Needed for joined layers, and for the parts of k and v where they are alike.

    Returns:
        The configuration in PEFT's words and the tensors under the names of an adapted model of ours
        (`model.layers.0.self_attn.q_proj.lora_A.weight`).

    Raises:
        FormatError: when a file is missing or broken, or the adapter is of a method that is not plain LoRA.
    """
    folder = Path(folder)
    values = read_json_object(folder / LORA_CONFIG, "a Paddle LoRA folder needs it")
    source = str(folder / LORA_CONFIG)
    config = _read_config(values, source)
    if model is None and (folder / "config.json").is_file():
        model = paddle_config_of(read_json_object(folder / "config.json", ""), str(folder / "config.json")).model
    degree = ConfigReader(values, source).integer("tensor_parallel_degree", 1)
    checkpoint = open_adapter_files(folder, LORA_STEM, degree)
    try:
        state: dict[str, Tensor] = {}
        for name in checkpoint.pieces:
            state |= _read(name, checkpoint, model)
    finally:
        checkpoint.close()
    _check(state, config, folder)
    return _with_targets(config, state, None if model is None else model.num_hidden_layers), state


def write_paddle_lora(
    folder: str | Path,
    config: PeftLoraConfig,
    state: Mapping[str, Tensor],
    base_model: LlamaConfig,
    tp: int = 1,
) -> None:
    """Write an adapter as PaddleNLP saves it, as a whole or not at all.

    Args:
        config: in PEFT's words; its `base_model_name_or_path` is kept.
        state: as `read_paddle_lora` returns it.
        base_model: the model that the adapter is for; its configuration is written beside the adapter.
        tp: processes of tensor parallelism, one file each.

    Raises:
        FormatError: for an adapter that PaddleNLP cannot load, or when something cannot be written.
    """
    _check_plain(config, state)
    layers = sorted({match["layer"] for name in state if (match := _OUR_MATRIX.fullmatch(name))}, key=_natural)
    if not layers:
        raise FormatError("the adapter has no LoRA matrices: nothing to write")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    if len(kinds) > 1:
        raise FormatError(f"the adapter has matrices of {' and '.join(kinds)}: Paddle's have one dtype")
    base = base_prefix(base_model)
    values = {
        "base_model_name_or_path": config.base_model_name_or_path,
        "dtype": kinds[0],
        "enable_lora_list": None,
        "head_dim": None,
        "lora_alpha": _whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "merge_weights": False,
        "r": config.r,
        "rslora": config.use_rslora,
        "scaling": config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        "target_modules": _patterns(layers, base, base_model),
        "tensor_parallel_degree": tp if tp > 1 else -1,
        "trainable_bias": {ours: paddle for paddle, ours in _BIASES.items()}[config.bias],
        "trainable_modules": None,
    }
    base_values = paddle_config(base_model, base_model.dtype or "float32", tp)
    with staged_folder(folder, replaces=(f"{LORA_STEM}*.pdparams",)) as staging:
        for rank in range(tp):
            parts = dict(_stored_part(name, tensor, base, base_model, tp, rank) for name, tensor in state.items())
            suffix = f".tp{rank:02d}" if tp > 1 else ""
            write_pdparams(staging / f"{LORA_STEM}{suffix}.pdparams", parts)
        for file, content in ((LORA_CONFIG, values), ("config.json", base_values)):
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (staging / file).write_text(text, encoding="utf-8")


def _read_config(values: Mapping[str, Any], source: str) -> PeftLoraConfig:
    reader = ConfigReader(values, source)
    for key, why in _OTHER_METHODS.items():
        if reader.boolean(key, False):
            raise FormatError(f"{source}: {key} is true ({why}), so this is no plain LoRA adapter: {_MERGE}")
    lists = values.get("enable_lora_list")
    if lists is not None and not (isinstance(lists, list) and all(entry is None for entry in lists)):
        raise FormatError(f"{source}: enable_lora_list adapts parts of a joined layer only: {_MERGE}")
    if values.get("trainable_modules"):
        raise FormatError(f"{source}: trainable_modules were trained as a whole: {_MERGE}")
    if values.get("trainable_bias") not in tuple(_BIASES):
        raise FormatError(f"{source}: trainable_bias must be null, 'lora' or 'all', got {values['trainable_bias']!r}")
    base = values.get("base_model_name_or_path")
    found = {
        "peft_type": "LORA",
        "r": reader.integer("r", 8),
        "lora_alpha": values.get("lora_alpha", 8),
        "lora_dropout": reader.number("lora_dropout", 0.0),
        "target_modules": ["q_proj"],  # those that the weights are of: see `_with_targets`
        "bias": _BIASES[values.get("trainable_bias")],
        "use_rslora": reader.boolean("rslora", False),
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }
    return PeftLoraConfig.from_dict(found, source)


def _read(name: str, checkpoint: Checkpoint, model: LlamaConfig | None) -> dict[str, Tensor]:
    """The tensors, under our names, that a stored one holds."""
    pieces = checkpoint.pieces[name]
    where = pieces[0].path
    base, _, rest = name.partition(".")
    match = _MATRIX.fullmatch(rest)
    layer = match["layer"] if match else rest.removesuffix(".bias")
    if base not in BASE_PREFIXES.values() or (match is None and not rest.endswith("_proj.bias")):
        raise FormatError(f"{where}: {name[:120]} is neither a LoRA matrix nor a bias of a layer: {_MERGE}")
    for piece in pieces:
        tensor_dtype(piece, name)
        if len(piece.shape) != (2 if match else 1):
            raise FormatError(f"{piece.path}: {name} has the shape {list(piece.shape)}")
    part = match["part"] if match else "bias"
    joined = _joined_places(f"{HF_PREFIX}.{layer}", model, where, len(pieces))
    if joined is None:
        _check_layer(layer, name, where)
        whole = _join(pieces, _axis(layer, part, model, pieces, name), name)
        return {_our_name(f"{HF_PREFIX}.{layer}", part): _turned(whole, part)}
    whole = _join(pieces, None if part == "A" else -1, name, blocks=joined[0][1].stored.blocks)
    result = {}
    for own, place in joined:
        if part == "A":
            result[_our_name(own, part)] = _turned(whole, part)
            continue
        if whole.shape[-1] != place.stored.shape[-1]:
            raise FormatError(
                f"{where}: {name} has {whole.shape[-1]} columns, config.json asks for {place.stored.shape[-1]}"
            )
        columns = [whole.narrow(-1, run.stored_start, run.size) for run in place.runs]
        result[_our_name(own, part)] = _turned(torch.cat(columns, -1), part)
    return result


def _joined_places(layer: str, model: LlamaConfig | None, where: Path, tp: int) -> list[tuple[str, Place]] | None:
    """Of a layer that holds several in one: their HF names and where their weights lie; None for any other layer."""
    number = re.fullmatch(r"model\.layers\.(\d{1,5})\.(.+)", layer)
    rows = [row for row in FUSED_ROWS if number and row.paddle.endswith(f".{number[2]}.weight")]
    if not rows or number is None:
        return None
    if model is None:
        raise FormatError(
            f"{where}: {layer} holds several layers in one, and nothing tells their heads: put the config.json of the base "
            "model into the folder"
        )
    found = places(model, tp, fused_attention=True, fused_ffn=True)
    names = [pattern.format(i=int(number[1])) for pattern in rows[0].hf]
    if names[0] not in found:
        raise FormatError(f"{where}: {layer} is not in the base model, which has {model.num_hidden_layers} layers")
    return [(name.removesuffix(".weight"), found[name]) for name in names]


def _check_layer(layer: str, name: str, where: Path) -> None:
    try:
        row_of(f"{HF_PREFIX}.{layer}.weight")
    except KeyError:
        raise FormatError(f"{where}: {name[:120]} is of no layer that a LLaMA has") from None


def _axis(layer: str, part: str, model: LlamaConfig | None, pieces: Sequence[Piece], name: str) -> int | None:
    """The axis along which processes hold parts; None: each holds all."""
    if len(pieces) == 1:
        return None
    weight = f"{HF_PREFIX}.{layer}.weight"
    axis = row_of(weight)[0].tp_axis
    if axis == 1 and layer.endswith(("k_proj", "v_proj")):
        if model is not None:
            axis = tp_axis_of(weight, model, len(pieces))
        elif part != "A":  # with fewer key-value heads than processes each holds all of k and v
            first = pieces[0].load(bfloat16=True)
            alike = all(torch.equal(first, piece.load(bfloat16=True)) for piece in pieces[1:])
            if alike and not first.any():
                raise FormatError(
                    f"{pieces[0].path}: {name} is zero in every file, so that nothing tells whether it was cut: put the "
                    "config.json of the base model into the folder"
                )
            axis = None if alike else axis
    return _cut_axis(part, axis)


def _cut_axis(part: str, axis: int | None) -> int | None:
    """Of a layer cut by columns (axis 1) B and the bias are cut along their last axis, of one by rows (axis 0) A along its
    first.
    """
    if axis == 1:
        return None if part == "A" else -1
    return 0 if axis == 0 and part == "A" else None


def _join(pieces: Sequence[Piece], axis: int | None, name: str, blocks: int = 1) -> Tensor:
    tensors = [piece.load(bfloat16=True) for piece in pieces]
    if axis is not None and len(tensors) > 1:
        if blocks > 1:
            chunks = [tensor.chunk(blocks, axis) for tensor in tensors]
            return torch.cat([chunk[block] for block in range(blocks) for chunk in chunks], axis)
        try:
            return torch.cat(tensors, axis)
        except RuntimeError as error:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
            raise FormatError(f"{pieces[0].path}: {name} has the shapes {shapes} in the processes' files") from error
    for piece, tensor in zip(pieces[1:], tensors[1:], strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise FormatError(
                f"{piece.path}: {name} differs from that in {pieces[0].path.name}, and each process should hold the same"
            )
    return tensors[0]


def _our_name(layer: str, part: str) -> str:
    return f"{layer}.bias" if part == "bias" else f"{layer}.lora_{part}.weight"


def _turned(tensor: Tensor, part: str) -> Tensor:
    """Into torch's layout, in memory of its own: it is small, and the file may be replaced."""
    return (tensor if part == "bias" else tensor.t()).clone(memory_format=torch.contiguous_format)


def _check(state: Mapping[str, Tensor], config: PeftLoraConfig, folder: Path) -> None:
    for name, tensor in state.items():
        match = _OUR_MATRIX.fullmatch(name)
        if match is None:
            continue
        if tensor.shape[0 if match["part"] == "A" else 1] != config.r:
            raise FormatError(f"{folder}: the shape {list(tensor.shape)} of {name} does not fit the rank {config.r}")
        other = f"{match['layer']}.lora_{'B' if match['part'] == 'A' else 'A'}.weight"
        if other not in state:
            raise FormatError(f"{folder}: {other} is missing; the files are incomplete")
    if not any(".lora_" in name for name in state):
        raise FormatError(f"{folder}: holds no LoRA matrices")


def _with_targets(config: PeftLoraConfig, state: Mapping[str, Tensor], depth: int | None) -> PeftLoraConfig:
    """With the adapted layers, by the last part of their names if every layer of the model has the same."""
    layers = {match["layer"] for name in state if (match := _OUR_MATRIX.fullmatch(name))}
    return PeftLoraConfig.from_dict(config.to_dict() | {"target_modules": list(targets_of(layers, depth))})


def _natural(layer: str) -> tuple[int, str]:
    match = re.match(r"model\.layers\.(\d{1,9})\.", layer)
    return (int(match[1]) if match else -1, layer)


def _check_plain(config: PeftLoraConfig, state: Mapping[str, Tensor]) -> None:
    """Raises FormatError for what PaddleNLP's LoRA does not have."""
    way_out = "merge it into the base model (arriero merge), and convert that"
    if config.use_dora:
        raise FormatError(f"PaddleNLP has no DoRA (use_dora): {way_out}")
    if config.rank_pattern or config.alpha_pattern:
        raise FormatError(f"PaddleNLP has one rank and alpha for all layers (rank_pattern, alpha_pattern): {way_out}")
    for name in state:
        match = _OUR_MATRIX.fullmatch(name)
        layer = match["layer"] if match else name.removesuffix(".bias")
        try:
            known = (match is not None or name.endswith("_proj.bias")) and row_of(f"{layer}.weight")[
                0
            ].tp_axis is not None
        except KeyError:
            known = False
        if not known or not layer.startswith("model.layers."):
            raise FormatError(f"PaddleNLP adapts the linear layers of the decoder only, and there is {name}: {way_out}")


def _patterns(layers: Sequence[str], base: str, model: LlamaConfig) -> list[str]:
    """`target_modules`: expressions that match whole names of layers."""
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    if len(layers) == len(kinds) * model.num_hidden_layers:
        return [f".*{kind}.*" for kind in kinds]
    return [re.escape(base + layer.removeprefix(HF_PREFIX)) for layer in layers]


def _stored_part(name: str, tensor: Tensor, base: str, model: LlamaConfig, tp: int, rank: int) -> tuple[str, Tensor]:
    """A process's part under Paddle's name and in its layout."""
    match = _OUR_MATRIX.fullmatch(name)
    layer, part = (match["layer"], match["part"]) if match else (name.removesuffix(".bias"), "bias")
    stored = tensor.t() if match else tensor
    own_name = base + layer.removeprefix(HF_PREFIX) + (f".lora_{part}" if match else ".bias")
    axis = _cut_axis(part, tp_axis_of(f"{layer}.weight", model, tp) if tp > 1 else None)
    if axis is not None:
        if stored.shape[axis] % tp:
            raise FormatError(f"{name}: its size {stored.shape[axis]} is no multiple of tensor_parallel_degree {tp}")
        stored = stored.chunk(tp, axis)[rank]
    return own_name, stored.contiguous()


def _whole(alpha: float) -> float | int:
    """PaddleNLP's alpha is a whole number where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha
