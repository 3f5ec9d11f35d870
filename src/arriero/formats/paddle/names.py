"""Where each tensor of an HF folder lies in a PaddleNLP checkpoint, and how tensor parallelism cuts it there.

The rules are those of `_get_name_mappings`, `_get_tensor_parallel_mappings` and `_get_fuse_or_split_param_mappings` in
paddlenlp/transformers/{llama,qwen2,mistral}/modeling.py (2.6.0 to 3.0.0b4). Paddle's layout of a linear layer is [in, out],
the transpose of torch's; rotary positions go by halves in both, so that no rows move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from arriero.errors import FormatError
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

HEAD = "lm_head.weight"
# What Paddle's names begin with; in the HF folder it is "model.".
BASE_PREFIXES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"}
HF_PREFIX = "model"


@dataclass(frozen=True)
class TensorRow:
    """One line of the table of names.

    Attributes:
        hf: names in an HF folder, several where Paddle keeps them in one tensor; `{i}` is the layer.
        paddle: the name in Paddle's checkpoint; `{base}` is llama, qwen2 or mistral.
        transposed: whether Paddle's layout is the transpose of the HF folder's.
        tp_axis: the axis, in Paddle's layout, that the processes of tensor parallelism share out; None: each holds it all.
        note: what the columns do not say.
    """

    hf: tuple[str, ...]
    paddle: str
    transposed: bool
    tp_axis: int | None
    note: str = ""


_LAYER, _STORED = "model.layers.{i}.", "{base}.layers.{i}."
_KEY_VALUE = "whole in each process when num_key_value_heads is no multiple of their number"
_VOCABULARY = "whole in each process when vocab_size is no multiple of their number"
_BIAS = "Qwen2 only"


def _row(name: str, transposed: bool, axis: int | None, note: str = "") -> TensorRow:
    return TensorRow((_LAYER + name,), _STORED + name, transposed, axis, note)


TENSOR_ROWS: tuple[TensorRow, ...] = (
    TensorRow(("model.embed_tokens.weight",), "{base}.embed_tokens.weight", False, 0, _VOCABULARY),
    _row("self_attn.q_proj.weight", True, 1),
    _row("self_attn.k_proj.weight", True, 1, _KEY_VALUE),
    _row("self_attn.v_proj.weight", True, 1, _KEY_VALUE),
    _row("self_attn.q_proj.bias", False, 0, _BIAS),
    _row("self_attn.k_proj.bias", False, 0, f"{_BIAS}; {_KEY_VALUE}"),
    _row("self_attn.v_proj.bias", False, 0, f"{_BIAS}; {_KEY_VALUE}"),
    _row("self_attn.o_proj.weight", True, 0),
    _row("mlp.gate_proj.weight", True, 1),
    _row("mlp.up_proj.weight", True, 1),
    _row("mlp.down_proj.weight", True, 0),
    _row("input_layernorm.weight", False, None),
    _row("post_attention_layernorm.weight", False, None),
    TensorRow(("model.norm.weight",), "{base}.norm.weight", False, None),
    TensorRow((HEAD,), HEAD, True, 1, f"not stored when tied; {_VOCABULARY}"),
)
_QKV = tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv")
_GROUPS = "for each key-value head: its query heads, its key, its value"
FUSED_ROWS: tuple[TensorRow, ...] = (
    TensorRow(tuple(f"{name}.weight" for name in _QKV), f"{_STORED}self_attn.qkv_proj.weight", True, 1, _GROUPS),
    TensorRow(tuple(f"{name}.bias" for name in _QKV), f"{_STORED}self_attn.qkv_proj.bias", False, 0, _GROUPS),
    TensorRow(
        (f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
        f"{_STORED}mlp.gate_up_fused_proj.weight",
        True,
        1,
        "gate, then up; each process holds its part of the gate, then its part of up",
    ),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a Paddle checkpoint.

    Attributes:
        name: Paddle's.
        shape: of the whole, in Paddle's layout.
        axis: that tensor parallelism cuts; None: each process holds all.
        blocks: of equal size along the axis; a process holds its part of each, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None
    blocks: int = 1

    def piece_shape(self, tp: int) -> tuple[int, ...]:
        """Of what one of `tp` processes holds.

        Raises:
            FormatError: when the tensor cannot be cut into so many.
        """
        if self.axis is None or tp == 1:
            return self.shape
        size = self.shape[self.axis]
        if size % (self.blocks * tp):
            raise FormatError(f"{self.name}: its size {size} is no multiple of tensor_parallel_degree {tp}")
        return (*self.shape[: self.axis], size // tp, *self.shape[self.axis + 1 :])

    def segments(self, tp: int) -> list[Segment]:
        """Which runs along the axis (the last, for one that is not cut) the processes hold."""
        axis = len(self.shape) - 1 if self.axis is None else self.axis
        size = self.shape[axis]
        if self.axis is None or tp == 1:
            return [Segment(0, 0, 0, size)]
        part = size // (self.blocks * tp)
        return [
            Segment(rank, block * part, (block * tp + rank) * part, part)
            for rank in range(tp)
            for block in range(self.blocks)
        ]


@dataclass(frozen=True)
class Segment:
    """A run of a tensor that is contiguous both in the whole and in a process's piece.

    Attributes:
        rank: of the process.
        start: in its piece.
        whole_start: in the whole tensor.
        size: of the run.
    """

    rank: int
    start: int
    whole_start: int
    size: int


@dataclass(frozen=True)
class Run:
    """A run of columns (the last axis of Paddle's layout) that is one in the stored tensor and in the HF folder's.

    Attributes:
        stored_start: in the stored tensor.
        start: in the HF folder's tensor, turned into Paddle's layout.
        size: of the run.
    """

    stored_start: int
    start: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a tensor of an HF folder lies in a Paddle checkpoint.

    Attributes:
        shape: in the HF folder.
        stored: the tensor that holds it.
        transposed: whether Paddle's layout is the transpose.
        runs: the columns of it in `stored`, in order; all of them, one run, where it has a stored tensor of its own.
    """

    shape: tuple[int, ...]
    stored: StoredTensor
    transposed: bool
    runs: tuple[Run, ...]


def places(
    config: LlamaConfig, tp: int = 1, *, fused_attention: bool = False, fused_ffn: bool = False
) -> dict[str, Place]:
    """Where every weight of a model lies, by its HF name, in the model's order.

    Args:
        tp: processes of tensor parallelism.
        fused_attention: q, k and v in one tensor.
        fused_ffn: gate and up in one tensor.

    Raises:
        FormatError: for a model that PaddleNLP has no class for.
    """
    base = base_prefix(config)
    found = {name: _place(name, shape, base, config, tp) for name, shape in weight_shapes(config).items()}
    if fused_attention:
        for kind, row in (("weight", FUSED_ROWS[0]), ("bias", FUSED_ROWS[1])):
            if kind == "weight" or config.attention_bias:
                _fuse(found, row, config.num_hidden_layers, base, _head_runs(config))
    if fused_ffn:
        size = config.intermediate_size
        runs = [(Run(0, 0, size),), (Run(size, 0, size),)]
        _fuse(found, FUSED_ROWS[2], config.num_hidden_layers, base, runs, blocks=2)
    return found


def base_prefix(config: LlamaConfig) -> str:
    """What Paddle's names of this model begin with.

    Raises:
        FormatError: for a model that PaddleNLP has no class for.
    """
    prefix = BASE_PREFIXES.get(config.model_type)
    if prefix is None:
        raise FormatError(
            f"PaddleNLP has no model of the type {config.model_type!r} ({', '.join(sorted(BASE_PREFIXES))} are): "
            "convert to hf or gguf"
        )
    if config.attention_output_bias or config.mlp_bias or (config.attention_bias and config.model_type != "qwen2"):
        raise FormatError(
            f"PaddleNLP's {config.model_type} has no biases, and this model has (attention_bias or mlp_bias): "
            "convert to hf or gguf"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise FormatError(
            f"PaddleNLP's heads have the size hidden_size / num_attention_heads, and head_dim is {config.head_dim} here: "
            "convert to hf or gguf"
        )
    return prefix


def row_of(name: str) -> tuple[TensorRow, str]:
    """The row of a tensor's HF name, and the number of its layer ("" for one outside the layers).

    Raises:
        KeyError: for a name that no row has.
    """
    if not name.startswith("model.layers."):
        return _ROWS[name], ""
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return _ROWS[_LAYER + rest], layer


_ROWS = {row.hf[0]: row for row in TENSOR_ROWS}


def tp_axis_of(name: str, config: LlamaConfig, tp: int) -> int | None:
    """The axis of Paddle's layout that `tp` processes share out, for a tensor's HF name."""
    axis = row_of(name)[0].tp_axis
    if (".k_proj." in name or ".v_proj." in name) and config.num_key_value_heads % tp:
        return None
    if name in (HEAD, "model.embed_tokens.weight") and config.vocab_size % tp:
        return None
    return axis


def _place(name: str, shape: tuple[int, ...], base: str, config: LlamaConfig, tp: int) -> Place:
    row, layer = row_of(name)
    stored_shape = shape[::-1] if row.transposed else shape
    stored = StoredTensor(row.paddle.format(base=base, i=layer), stored_shape, tp_axis_of(name, config, tp))
    return Place(shape, stored, row.transposed, (Run(0, 0, stored_shape[-1]),))


def _head_runs(config: LlamaConfig) -> list[tuple[Run, ...]]:
    """Of q, k and v in a fused tensor: for each key-value head its query heads, its key and its value."""
    size, shared = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // shared * size
    group = queries + 2 * size
    return [
        tuple(Run(head * group, head * queries, queries) for head in range(shared)),
        tuple(Run(head * group + queries, head * size, size) for head in range(shared)),
        tuple(Run(head * group + queries + size, head * size, size) for head in range(shared)),
    ]


def _fuse(
    found: dict[str, Place],
    row: TensorRow,
    layers: int,
    base: str,
    runs: Sequence[tuple[Run, ...]],
    blocks: int = 1,
) -> None:
    """Put the tensors that a row joins into one, in every layer."""
    for layer in range(layers):
        names = [pattern.format(i=layer) for pattern in row.hf]
        width = sum(found[name].stored.shape[-1] for name in names)
        shape = (*found[names[0]].stored.shape[:-1], width)
        stored = StoredTensor(row.paddle.format(base=base, i=layer), shape, row.tp_axis, blocks)
        for name, own in zip(names, runs, strict=True):
            found[name] = replace(found[name], stored=stored, runs=own)


def stored_tensors(found: Mapping[str, Place]) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by Paddle's name."""
    return {place.stored.name: place.stored for place in found.values()}
