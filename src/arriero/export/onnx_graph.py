"""The decoder as an ONNX graph, in the operators that ONNX Runtime has fast kernels for.

One graph computes prompts and continues them. It takes sequences that begin at different lengths and bring different
numbers of tokens; keys and values are written in place, into the buffers that are given as past and as present.

inputs      input_ids (B, S) int64, rows filled up on the right; query_lengths (B) int32, the real ones of each row;
            seqlens_k (B) int32, tokens of each sequence with these, less one; total_sequence_length () int32, the most;
            logits_at (n) int64, places in the flattened input_ids; past_key_values.L.key and .value,
            (B, KV, context, D) fp32 for each layer L
outputs     logits (n, vocab_size) fp32; present.L.key and .value, the same buffers
operators   https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from arriero import __version__
from arriero.errors import ConfigError
from arriero.export.block_weights import BlockFormat, BlockWeight, with_update
from arriero.export.data_file import DataFile
from arriero.export.rope_tables import rope_tables
from arriero.export.weight_names import EMBEDDING
from arriero.export.weight_source import WeightSource
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import HEAD

MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 21, 10
# Of the operator's rotation (measured with ONNX Runtime 1.32: others are refused when it runs).
HEAD_DIM_UNIT = 16


@dataclass(frozen=True)
class WeightForm:
    """How the matrices of a graph are stored and multiplied.

    Attributes:
        half: plain weights are stored in fp16, and computed with in fp32.
        layers: of the linear layers; None for plain weights.
        head: of the output head and the embedding; None for plain ones.
        accuracy_level: of block weights: 4 rounds a matrix product's inputs to int8 a block at a time, which is several times
            faster; 0 or 1 computes in fp32.
    """

    half: bool = False
    layers: BlockFormat | None = None
    head: BlockFormat | None = None
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 1, 4):
            raise ConfigError(f"an accuracy level of {self.accuracy_level} is not supported: 0, 1 or 4")


def check_config(config: LlamaConfig, context: int) -> None:
    """Refuse what the operators cannot compute.

    Raises:
        ConfigError: naming it.
    """
    if config.head_dim % HEAD_DIM_UNIT:
        raise ConfigError(
            f"a head_dim of {config.head_dim} cannot be exported to onnx: its attention needs a multiple of {HEAD_DIM_UNIT}; "
            "export gguf"
        )
    if not 2 <= context <= config.max_position_embeddings:
        raise ConfigError(
            f"a context of {context} cannot be exported: from 2 to the model's {config.max_position_embeddings} positions can"
        )


class OnnxGraph:
    """Builds the graph of a model, and writes each weight when the graph needs it."""

    def __init__(self, source: WeightSource, form: WeightForm, context: int, data: DataFile) -> None:
        """
        Raises:
            ConfigError: what `check_config` refuses, and dynamic RoPE.
        """
        check_config(source.config, context)
        self.config, self._source, self._form, self._context, self._data = source.config, source, form, context, data
        self._nodes: list[Any] = []
        self._tables: tuple[str, str] = ("", "")
        self._embedding: list[str] = []  # the tensors of one in blocks
        self._rank = 3  # dimensions of what flows

    def build(self) -> onnx.ModelProto:
        """The model, with its weights in the data file.

        Raises:
            OSError: when the data file cannot be written.
        """
        cos, sin = rope_tables(self.config, self._context)
        self._tables = (self._data.add("rope.cos", cos), self._data.add("rope.sin", sin))
        residual, update = self._embed("input_ids"), ""
        last = self.config.num_hidden_layers - 1
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            residual, normed = self._norm(f"{name}.input_layernorm", residual, update)
            heads = self._attend(f"{name}.self_attn", layer, normed)
            if layer == last:  # nothing that follows looks at other tokens
                heads, residual = self._wanted(heads, "heads"), self._wanted(residual, "residual")
                self._rank = 2
            update = self._linear(f"{name}.self_attn.o_proj", heads)
            residual, normed = self._norm(f"{name}.post_attention_layernorm", residual, update)
            update = self._feed_forward(f"{name}.mlp", normed)
        _, normed = self._norm("model.norm", residual, update)
        self._head(normed)
        return self._model()

    def _node(
        self, kind: str, inputs: Sequence[str], name: str, outputs: int | Sequence[str] = 1, **settings: Any
    ) -> Any:
        """Add a node; returns its output's name, or a list of them."""
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        if outputs == 1:
            names = [name]
        domain = MICROSOFT if kind in _OF_MICROSOFT else ""
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=name, domain=domain, **settings))
        return names[0] if outputs == 1 else names

    def _constant(self, name: str, values: Sequence[int]) -> str:
        """A few integers, in the graph itself."""
        known = {node.output[0] for node in self._nodes if node.op_type == "Constant"}
        if name not in known:
            tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values))
            self._node("Constant", [], name, value=tensor)
        return name

    def _plain(self, name: str, values: np.ndarray[Any, Any]) -> str:
        """A weight of the graph, fp32."""
        if not self._form.half or values.ndim < 2:
            return self._data.add(name, values.astype(np.float32, copy=False))
        stored = self._data.add(f"{name}.fp16", values.astype(np.float16))
        cast: str = self._node("Cast", [stored], name, to=TensorProto.FLOAT)
        return cast

    def _embed(self, ids: str) -> str:
        """(B, S) ids -> (B, S, hidden)."""
        form = self._form.head
        if form is None:
            table = self._plain(EMBEDDING, self._source.load(EMBEDDING).float().numpy())
            found: str = self._node("Gather", [table, ids], "embedding")
            return found
        weight = self._source.blocks([EMBEDDING], form)
        names = self._embedding = self._add_blocks(EMBEDDING, weight)
        rows, blocks = weight.scales.shape
        # the same bytes: this operator wants a row of blocks as one row
        flat = self._data.again(f"{EMBEDDING}.rows", names[0], [rows, blocks * weight.packed.shape[2]])
        found = self._node(
            "GatherBlockQuantized",
            [flat, ids, *names[1:]],
            "embedding.blocks" if weight.in_features % form.block_size else "embedding",
            bits=form.bits,
            block_size=form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if weight.in_features % form.block_size:  # what fills up the last block
            ends = [self._constant(key, [value]) for key, value in (("at.0", 0), ("at.hidden", weight.in_features))]
            found = self._node("Slice", [found, *ends, self._constant("axis.last", [-1])], "embedding")
        return found

    def _norm(self, name: str, residual: str, update: str) -> tuple[str, str]:
        """The residual stream with the update added, and its RMS norm."""
        scale = self._data.add(f"{name}.weight", self._source.load(f"{name}.weight").float().numpy())
        epsilon = self.config.rms_norm_eps
        if not update:
            normed = self._node(
                "SimplifiedLayerNormalization", [residual, scale], name, axis=-1, epsilon=epsilon, stash_type=1
            )
            return residual, normed
        outputs = [name, "", "", f"{name}.residual"]
        self._node("SkipSimplifiedLayerNormalization", [residual, update, scale], name, outputs, epsilon=epsilon)
        return outputs[3], name

    def _linear(self, name: str | Sequence[str], x: str, label: str = "") -> str:
        """One or several linear layers of the same input, their outputs one after the other."""
        names = [name] if isinstance(name, str) else list(name)
        label = label or names[0]
        weights = [f"{one}.weight" for one in names]
        biased = f"{names[0]}.bias" in self._source.names
        bias = self._source.rows([f"{one}.bias" for one in names]).numpy() if biased else None
        form = self._form.layers
        if form is not None:
            added = "" if bias is None else self._data.add(f"{label}.bias", bias)
            weight = self._source.blocks(weights, form)
            update = self._source.update(weights) if weight.format.bits == 4 else None
            if update is not None:
                weight = with_update(weight, update.up)
            x = self._block_inputs(x, weight, label, None if update is None else update.down.numpy())
            shape = (len(weight.scales), weight.columns)
            return self._block_product(label, x, self._add_blocks(label, weight), weight.format, shape, added)
        matrix = self._plain(f"{label}.weight", self._source.rows(weights).numpy().T)
        product: str = self._node("MatMul", [x, matrix], label if bias is None else f"{label}.product")
        if bias is not None:
            product = self._node("Add", [product, self._data.add(f"{label}.bias", bias)], label)
        return product

    def _block_inputs(self, x: str, weight: BlockWeight, label: str, down: np.ndarray[Any, Any] | None) -> str:
        """The inputs of a product with the sums of their blocks behind them, and what an adapter makes of them; see
        `block_weights`."""
        parts = self._with_sums(x, weight.in_features, weight.format, label) if weight.format.offsets else [x]
        if down is not None:
            # zeros, up to the beginning of a block
            short = weight.columns - weight.rank - weight.format.columns(weight.in_features)
            stored = self._data.add(f"{label}.down", np.pad(down.T, ((0, 0), (short, 0))))
            parts.append(self._node("MatMul", [x, stored], f"{label}.adapter"))
        joined: str = self._node("Concat", parts, f"{label}.inputs", axis=-1) if len(parts) > 1 else x
        return joined

    def _with_sums(self, x: str, in_features: int, form: BlockFormat, label: str) -> list[str]:
        """Inputs, and the sums of their blocks."""
        blocks, size = form.blocks(in_features), form.block_size
        if in_features % size:
            ends = self._constant(f"fill.{-in_features % size}", [0, -in_features % size])
            x = self._node("Pad", [x, ends, "", self._constant("axis.last", [-1])], f"{label}.filled")
        outer = [0] * (self._rank - 1)  # as they are
        shape = self._constant(f"shape.{self._rank}.{blocks}.{size}", [*outer, blocks, size])
        apart = self._node("Reshape", [x, shape], f"{label}.blocks")
        sums = self._node("ReduceSum", [apart, self._constant("axis.last", [-1])], f"{label}.sums", keepdims=0)
        return [x, sums]

    def _add_blocks(self, name: str, weight: BlockWeight) -> list[str]:
        names = [self._data.add(f"{name}.packed", weight.packed), self._data.add(f"{name}.scales", weight.scales)]
        if weight.zero_points is not None:
            names.append(self._data.add(f"{name}.zero_points", weight.zero_points))
        return names

    def _block_product(
        self, name: str, x: str, stored: list[str], form: BlockFormat, shape: tuple[int, int], bias: str = ""
    ) -> str:
        """x times a stored matrix (out, in) in blocks."""
        if bias:
            stored = stored + [""] * (4 - len(stored)) + [bias]  # no zero points, no g_idx
        product: str = self._node(
            "MatMulNBits",
            [x, *stored],
            name,
            K=shape[1],
            N=shape[0],
            bits=form.bits,
            block_size=form.block_size,
            accuracy_level=self._form.accuracy_level,
        )
        return product

    def _attend(self, name: str, layer: int, x: str) -> str:
        """(B, S, hidden) -> the heads' outputs (B, S, heads * D)."""
        config = self.config
        packed = self._linear([f"{name}.{part}_proj" for part in "qkv"], x, f"{name}.qkv_proj")
        query_key_value = [packed, "", ""]
        if config.qk_norm:
            sizes = [
                count * config.head_dim for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
            ]
            parts = self._node("Split", [packed, self._constant("qkv.sizes", sizes)], f"{name}.split", 3, axis=-1)
            query_key_value = [
                self._head_norm(f"{name}.q_norm", parts[0], sizes[0]),
                self._head_norm(f"{name}.k_norm", parts[1], sizes[1]),
                parts[2],
            ]
        cache = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        outputs = [f"{name}.heads", f"present.{layer}.key", f"present.{layer}.value"]
        window = config.layer_sliding_window(layer)
        lengths = ["seqlens_k", "total_sequence_length"]
        # no position_ids, attention_bias, head_sink, k_scale, v_scale, q_norm_weight and k_norm_weight
        self._node(
            "GroupQueryAttention",
            [*query_key_value, *cache, *lengths, *self._tables, *[""] * 7, "query_lengths"],
            f"{name}.attention",
            outputs,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            scale=config.head_dim**-0.5,
            local_window_size=-1 if window is None else window,
        )
        return outputs[0]

    def _head_norm(self, name: str, x: str, size: int) -> str:
        """RMS norm of each head (Qwen3), which the operator does not do on a CPU."""
        shape = self._constant("shape.heads", [0, 0, -1, self.config.head_dim])
        scale = self._data.add(f"{name}.weight", self._source.load(f"{name}.weight").float().numpy())
        heads = self._node("Reshape", [x, shape], f"{name}.split")
        normed = self._node(
            "SimplifiedLayerNormalization",
            [heads, scale],
            name,
            axis=-1,
            epsilon=self.config.rms_norm_eps,
            stash_type=1,
        )
        joined: str = self._node("Reshape", [normed, self._constant(f"shape.{size}", [0, 0, size])], f"{name}.join")
        return joined

    def _wanted(self, x: str, name: str) -> str:
        """(B, S, size) -> (n, size), the rows whose logits are wanted."""
        size = self.config.hidden_size if name == "residual" else self.config.num_attention_heads * self.config.head_dim
        rows = self._node("Reshape", [x, self._constant(f"shape.rows.{name}", [-1, size])], f"wanted.{name}.rows")
        found: str = self._node("Gather", [rows, "logits_at"], f"wanted.{name}", axis=0)
        return found

    def _feed_forward(self, name: str, x: str) -> str:
        both = self._linear([f"{name}.gate_proj", f"{name}.up_proj"], x, f"{name}.gate_up_proj")
        sizes = self._constant("gate_up.sizes", [self.config.intermediate_size] * 2)
        gate, up = self._node("Split", [both, sizes], f"{name}.split", 2, axis=-1)
        activated = self._node("QuickGelu", [gate], f"{name}.silu", alpha=1.0)  # x * sigmoid(x)
        return self._linear(f"{name}.down_proj", self._node("Mul", [activated, up], f"{name}.gated"))

    def _head(self, x: str) -> None:
        """(n, hidden) -> logits (n, vocab_size)."""
        form, tied = self._form.head, self.config.tie_word_embeddings
        if form is not None:
            stored = self._embedding if tied else self._add_blocks(HEAD, self._source.blocks([HEAD], form))
            self._block_product("logits", x, stored, form, (self.config.vocab_size, self.config.hidden_size))
            return
        matrix = EMBEDDING if tied else self._plain(HEAD, self._source.load(HEAD).float().numpy())
        self._node("Gemm", [x, matrix], "logits", transB=1)

    def _model(self) -> onnx.ModelProto:
        config = self.config
        cache: list[str | int | None] = ["batch", config.num_key_value_heads, self._context, config.head_dim]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("query_lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logits_at", TensorProto.INT64, ["wanted"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["wanted", config.vocab_size])]
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                kind = TensorProto.FLOAT
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", kind, cache))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", kind, cache))
        graph = helper.make_graph(self._nodes, config.model_type, inputs, outputs, self._data.initializers)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="arriero",
            producer_version=__version__,
        )


_OF_MICROSOFT = frozenset(
    ("GroupQueryAttention", "MatMulNBits", "GatherBlockQuantized", "SkipSimplifiedLayerNormalization", "QuickGelu")
)
