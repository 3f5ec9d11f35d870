"""What autograd keeps of a forward pass in one process, tensor by tensor.

The tables here follow `models/llama.py`, `models/attention.py` and `training/loss.py` line by line and have to change with
them; `tests/unit/test_plan_activations.py` counts what autograd really keeps and fails when they do not.
The way of counting is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), done for this model and its kernels.
Tensor parallelism keeps the gathered input of each pair of blocks, so that the backward pass need not gather it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from arriero.config.layout import Layout
from arriero.models.config import LlamaConfig
from arriero.models.tensor_split import cut_of
from arriero.training.planning.setup import ModelFacts, Parameter, TrainingSetup

FLOAT, INDEX = 4, 8  # bytes of fp32 and int64

Kernel = Literal["fused", "written out"]


@dataclass(frozen=True)
class Saved:
    """A tensor kept for the backward pass.

    Attributes:
        size: bytes.
        core: whether recompute granularity core_attn computes it again.
        cast: whether it is a cast of weights, which all micro-batches under one autocast share.
    """

    name: str
    size: int
    core: bool = False
    cast: bool = False


@dataclass(frozen=True)
class Widths:
    """Numbers a token in one process, in its part of each matrix: the first process has the greatest parts.

    Attributes:
        heads, key_heads: of queries, and of keys and values.
        query, key: all heads together.
        inner: feed-forward units.
        vocabulary: rows of the output head.
    """

    heads: int
    key_heads: int
    query: int
    key: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, facts: ModelFacts, tp: int) -> Widths:
        return _widths(facts, tp)


@lru_cache(maxsize=256)
def _widths(facts: ModelFacts, tp: int) -> Widths:
    config = facts.config

    def part(name: str, length: int) -> int:
        return cut_of(f"{name}.weight", (length, config.hidden_size), config, tp, 0).size

    query = part("q_proj", config.num_attention_heads * config.head_dim)
    key = part("k_proj", config.num_key_value_heads * config.head_dim)
    inner, vocabulary = part("gate_proj", config.intermediate_size), part("lm_head", config.vocab_size)
    return Widths(math.ceil(query / config.head_dim), key // config.head_dim, query, key, inner, vocabulary)


def gathered_tokens(setup: TrainingSetup) -> int:
    """Keys that a device holds for its queries; under context parallelism as `parallel/context.py` gathers them.

    In a ring they are its own until the backward pass.
    """
    alone = setup.layout.cp == 1 or setup.layout.has_ring(setup.device)
    return setup.tokens if alone else _gathered(setup.batch, setup.sequence, setup.layout.cp)


@lru_cache(maxsize=1024)
def _gathered(rows: int, sequence: int, cp: int) -> int:
    """The most of any process: for each of its two chunks of the packed rows, from its first row's start to its end."""
    chunk = math.ceil(rows * sequence / (2 * cp))

    def keys(place: int) -> int:
        return (place + 1) * chunk - place * chunk // sequence * sequence

    return max(keys(rank) + keys(2 * cp - 1 - rank) for rank in range(cp))


def scores(setup: TrainingSetup) -> int:
    """Pairs of query and key that a device has scores of, for each head, where a kernel writes them out."""
    if setup.layout.cp == 1:
        return setup.tokens * setup.sequence
    return math.ceil(setup.tokens / 2) * gathered_tokens(setup)


def attention_kernel(config: LlamaConfig, setup: TrainingSetup, layer: int, prefix: int = 0) -> Kernel:
    """Which attention torch takes: "fused" ones keep no scores, "written out" (its math kernel) keeps all of them.

    The CPU's flash kernel takes everything that this model asks for, and a ring keeps no scores by any kernel. On CUDA
    flash attention wants half precision and no mask, and the memory-efficient kernel, which takes fp32 and masks, refuses
    grouped heads (https://github.com/pytorch/pytorch/issues/154363); a sliding window shorter than the row is a mask, and so is
    a prefix where there is no flash attention over packed rows, in fp32.
    """
    if setup.device == "cpu" or setup.layout.has_ring(setup.device):
        return "fused"
    window = config.layer_sliding_window(layer)
    half = setup.compute_dtype != "float32"
    masked = (window is not None and window < setup.sequence) or (prefix > 0 and not half)
    grouped = config.num_attention_heads != config.num_key_value_heads
    return "written out" if grouped and (masked or not half) else "fused"


def norm_saved(name: str, rows: int, width: int, facts: ModelFacts, setup: TrainingSetup, item: int) -> list[Saved]:
    """RMSNorm of (rows, width) in numbers of `item` bytes.

    On CUDA the fused kernel keeps its input and a factor a row. The CPU writes it out in fp32; where the weight is trained
    it keeps the normalised rows too.
    """
    if setup.device == "cuda":
        return [Saved(f"{name}: input", rows * width * item), Saved(f"{name}: 1/rms", rows * FLOAT)]
    saved = [Saved(f"{name}: input in fp32", rows * width * FLOAT), Saved(f"{name}: 1/rms", rows * FLOAT)]
    if not facts.method.frozen:
        saved.append(Saved(f"{name}: normalised", rows * width * FLOAT))
    return saved


def block_saved(facts: ModelFacts, setup: TrainingSetup, layer: int = 0) -> list[Saved]:
    """What one decoder layer keeps without recomputation."""
    config, tokens, stream = facts.config, setup.tokens, setup.stream_tokens
    hidden, item = config.hidden_size, setup.compute_bytes
    widths = Widths.of(facts, setup.layout.tp)
    saved = []
    # the embedding's output needs no gradient when it is frozen, so neither does the first layer's norm
    if not (facts.method.frozen and layer == 0):
        saved += norm_saved("input norm", stream, hidden, facts, setup, setup.weight_bytes)
    if facts.keeps_input("q_proj", "k_proj", "v_proj"):
        saved.append(Saved("q, k, v input", tokens * hidden * _input_bytes(facts, setup, "q_proj", "k_proj", "v_proj")))
    if config.qk_norm:
        for name, count in (("q norm", widths.heads), ("k norm", widths.key_heads)):
            norm = norm_saved(name, tokens * count, config.head_dim, facts, setup, item)
            saved += [Saved(tensor.name, tensor.size, True) for tensor in norm]
    saved += _attention_saved(facts, setup, layer, widths)
    saved += _unscaled(facts, tokens, item, ("o_proj", hidden), ("down_proj", hidden))
    saved += _unscaled(facts, tokens, item, ("gate_proj", widths.inner), ("up_proj", widths.inner))
    saved += norm_saved("post-attention norm", stream, hidden, facts, setup, setup.weight_bytes)
    if facts.keeps_input("gate_proj", "up_proj"):
        saved.append(Saved("gate, up input", tokens * hidden * _input_bytes(facts, setup, "gate_proj", "up_proj")))
    saved += [Saved(name, tokens * widths.inner * item) for name in ("gate", "silu(gate)", "up")]
    if facts.keeps_input("down_proj"):
        saved.append(Saved("silu(gate) * up", tokens * widths.inner * (_adapter_cast(facts, setup) or item)))
    if setup.keeps_casts:
        attention, mlp = (_cast_weights(facts, setup.layout, part) * item for part in (".self_attn.", ".mlp."))
        saved.append(Saved("attention weights in half precision", attention, True, True))
        saved.append(Saved("MLP weights in half precision", mlp, False, True))
        if facts.method.quantize_base is not None:
            saved += _cast_adapters(facts, setup, layer)
    return saved


def _attention_saved(facts: ModelFacts, setup: TrainingSetup, layer: int, widths: Widths) -> list[Saved]:
    config, tokens, item = facts.config, setup.tokens, setup.compute_bytes
    heads, query, window = widths.heads, widths.query, config.layer_sliding_window(layer)
    # a prefix stands before the keys and values of every row
    keys, ring = gathered_tokens(setup) + setup.batch * facts.method.prefix_length, setup.layout.has_ring(setup.device)
    saved = [Saved("attention output", tokens * query * item, True)]
    if facts.adapts("o_proj") and (cast := _adapter_cast(facts, setup)):
        saved.append(Saved("attention output, cast", tokens * query * cast, True))
    heads_of = (("q_proj", query), ("k_proj", widths.key), ("v_proj", widths.key))
    saved += [Saved(kept.name, kept.size, True) for kept in _unscaled(facts, tokens, item, *heads_of)]
    prefix = facts.method.prefix_length
    if attention_kernel(config, setup, layer, prefix) == "written out":
        # keys and values are repeated for every query head, and all of it is fp32
        saved.append(Saved("scaled q in fp32", tokens * query * FLOAT, True))
        saved += [Saved(f"{name} in fp32", keys * query * FLOAT, True) for name in ("scaled k", "v")]
        saved.append(Saved("attention weights", scores(setup) * heads * FLOAT, True))
    else:
        saved.append(Saved("q", tokens * query * item, True))
        saved += [Saved(name, keys * widths.key * item, True) for name in ("k", "v")]
        saved.append(Saved("log-sum-exp of the scores", tokens * heads * FLOAT, True))
        windowed = window is not None and window < setup.sequence and not ring
        if windowed or (prefix and (setup.device == "cpu" or item == FLOAT)):
            pairs = setup.sequence * (setup.sequence + prefix)
            saved.append(Saved("mask of the window or the prefix", pairs * item, True))
    if facts.method.prefix_network:  # each layer runs what the layers share
        saved.append(Saved("network of the prefix", prefix * facts.method.prefix_network * FLOAT, True))
    if setup.layout.cp > 1 and not ring and (setup.device == "cpu" or item == FLOAT):
        # without a kernel for documents each chunk is one call of attention, with a mask that ends at its last query
        saved.append(Saved("attention output of each chunk", tokens * query * item, True))
        saved.append(Saved("masks of the chunks", scores(setup) * item, True))
    if facts.method.lora_rank:
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        size = tokens * facts.method.lora_rank * (item if setup.autocast else FLOAT)
        saved += [Saved(f"{name}: x A", size, True) for name in attention if facts.adapts(name)]
        saved += [Saved(f"{name}: x A", size) for name in mlp if facts.adapts(name)]
    return saved


def _input_bytes(facts: ModelFacts, setup: TrainingSetup, *layers: str) -> int:
    """Bytes of a number of a norm's output, as the linear layers that it goes into keep it together.

    Under autocast each of them casts it for itself; an adapted one keeps what it was given, but for `_adapter_cast`.
    """
    if cast := _adapter_cast(facts, setup):
        return facts.adapts(*layers) * cast
    if facts.method.lora_rank:
        return setup.weight_bytes
    return len(layers) * setup.compute_bytes if setup.autocast else setup.compute_bytes


def _adapter_cast(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Bytes of a number of an adapted layer's input as its adapter casts it, 0 where it does not.

    On a base in few bits an adapter casts it for itself: to half precision under autocast, to its own fp32 in O2.
    """
    if facts.method.quantize_base is None or setup.compute_bytes == FLOAT:
        return 0
    return setup.compute_bytes if setup.autocast else FLOAT


def _unscaled(facts: ModelFacts, tokens: int, item: int, *widths: tuple[str, int]) -> list[Saved]:
    """Outputs of adapted layers that are yet to be scaled by the rows' trained lengths (DoRA)."""
    if not facts.method.dora:
        return []
    return [Saved(f"{name} before its lengths", tokens * width * item) for name, width in widths if facts.adapts(name)]


def _cast_weights(facts: ModelFacts, layout: Layout, part: str) -> int:
    """Numbers in the matrices of one layer's attention or MLP that autocast casts and autograd keeps: the unadapted ones."""
    own = [p for p in facts.layer if part in p.name and p.ndim == 2 and not p.is_adapter and p.fixed is None]
    kept = [p for p in own if not facts.adapts(p.name.split(".")[-2])]
    return sum(math.prod(local_shape(p, facts.config, layout.tp)) for p in kept)


def _cast_adapters(facts: ModelFacts, setup: TrainingSetup, layer: int) -> list[Saved]:
    """Half-precision copies of the adapters of a base in few bits, under autocast; those of other bases cast for each product.

    The first layer's norm needs no gradient, so that A of the layers it goes into is not kept there.
    """
    saved = []
    for parameter in facts.layer:
        name, matrix = parameter.name.split(".")[-3], parameter.name.split(".")[-2]
        first = layer == 0 and matrix == "lora_A" and name in ("q_proj", "k_proj", "v_proj")
        if matrix in ("lora_A", "lora_B") and not first:
            size = math.prod(local_shape(parameter, facts.config, setup.layout.tp)) * setup.compute_bytes
            saved.append(Saved(f"{name}: {matrix} in half precision", size, ".self_attn." in parameter.name, True))
    return saved


def local_shape(parameter: Parameter, config: LlamaConfig, tp: int) -> tuple[int, ...]:
    """Of a parameter in the first of the processes that share out its matrix: it has the most."""
    cut = cut_of(parameter.name, parameter.shape, config, tp, 0)
    return tuple(cut.size if dim == cut.dim else length for dim, length in enumerate(parameter.shape))


def kept_of_block(facts: ModelFacts, setup: TrainingSetup, layer: int = 0) -> list[Saved]:
    """What one decoder layer keeps until its backward pass under the setup's recomputation."""
    saved = block_saved(facts, setup, layer)
    stream = setup.stream_tokens * facts.config.hidden_size * setup.weight_bytes
    if setup.recompute == "full":
        return [Saved("input of the layer", stream)]
    if setup.recompute == "core_attn":
        kept = [tensor for tensor in saved if not tensor.core and tensor.name != "q, k, v input"]
        # the attention block is called with the norm's output, before any cast
        return [*kept, Saved("input of attention", stream)]
    return saved


def model_saved(facts: ModelFacts, setup: TrainingSetup) -> list[Saved]:
    """What is kept outside of the decoder layers, the loss left out."""
    config, tokens = facts.config, setup.tokens
    positions = setup.sequence if setup.layout.cp == 1 else tokens
    rotary = 2 * positions * config.head_dim * setup.weight_bytes
    saved = [Saved("cos and sin", rotary)]
    if not facts.method.frozen:
        saved.append(Saved("token ids", tokens * INDEX))
    saved += norm_saved("final norm", setup.stream_tokens, config.hidden_size, facts, setup, setup.weight_bytes)
    return saved


def loss_saved(facts: ModelFacts, setup: TrainingSetup) -> list[Saved]:
    """What the loss keeps: it forms the gradients at once, in fp32."""
    config, rows = facts.config, Widths.of(facts, setup.layout.tp).vocabulary
    saved = [Saved("index of the labels", setup.tokens * INDEX)]
    saved.append(Saved("gradient of the hidden states", setup.tokens * config.hidden_size * FLOAT))
    if not facts.method.frozen:
        saved.append(Saved("gradient of the output head", rows * config.hidden_size * FLOAT))
    return saved


def total(saved: list[Saved]) -> int:
    """Bytes of some saved tensors."""
    return sum(tensor.size for tensor in saved)


def blocks_kept(
    facts: ModelFacts, setup: TrainingSetup, layers: Sequence[int] | None = None, times: float = 1.0
) -> int:
    """Bytes that decoder layers keep together.

    Args:
        layers: by default all.
        times: forward passes whose tensors are kept at once; casts of weights are kept once.
    """
    held = tuple(range(facts.config.num_hidden_layers)) if layers is None else tuple(layers)
    once = again = 0
    for layer, count in _kinds(facts, held):
        kept = kept_of_block(facts, setup, layer)
        casts = sum(tensor.size for tensor in kept if tensor.cast)
        once += casts * count
        again += (total(kept) - casts) * count
    return once + math.ceil(again * times)


@lru_cache(maxsize=1024)
def _kinds(facts: ModelFacts, layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """One layer of each kind that keeps something else, and how many of it there are."""
    found: dict[tuple[bool, int | None], list[int]] = {}
    for layer in layers:
        found.setdefault((layer == 0, facts.config.layer_sliding_window(layer)), []).append(layer)
    return [(alike[0], len(alike)) for alike in found.values()]
