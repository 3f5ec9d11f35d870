"""What autograd keeps of a forward pass, tensor by tensor.

The tables here follow `models/llama.py`, `models/attention.py` and `training/loss.py` line by line and have to change with
them; `tests/unit/test_plan_activations.py` counts what autograd really keeps and fails when they do not.
The way of counting is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), done for this model and its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arriero.models.config import LlamaConfig
from arriero.training.planning.setup import ModelFacts, TrainingSetup

FLOAT, INDEX = 4, 8  # bytes of fp32 and int64

Kernel = Literal["fused", "written out"]


@dataclass(frozen=True)
class Saved:
    """A tensor kept for the backward pass. `core` ones are computed again by recompute granularity core_attn."""

    name: str
    size: int  # bytes
    core: bool = False


def attention_kernel(config: LlamaConfig, setup: TrainingSetup, layer: int) -> Kernel:
    """Which attention torch takes: "fused" ones keep no scores, "written out" (its math kernel) keeps all of them.

    The CPU's flash kernel takes everything that this model asks for. On CUDA flash attention wants half precision and no
    mask, and the memory-efficient kernel, which takes fp32 and masks, refuses grouped heads
    (https://github.com/pytorch/pytorch/issues/154363); a sliding window shorter than the row is a mask.
    """
    if setup.device == "cpu":
        return "fused"
    window = config.layer_sliding_window(layer)
    masked = window is not None and window < setup.sequence
    grouped = config.num_attention_heads != config.num_key_value_heads
    half = setup.compute_dtype != "float32"
    return "written out" if grouped and (masked or not half) else "fused"


def norm_saved(name: str, rows: int, width: int, facts: ModelFacts, setup: TrainingSetup, item: int) -> list[Saved]:
    """RMSNorm of (rows, width) in numbers of `item` bytes.

    On CUDA the fused kernel keeps its input and a factor a row. The CPU writes it out in fp32; where the weight is trained
    it keeps the normalised rows too.
    """
    if setup.device == "cuda":
        return [Saved(f"{name}: input", rows * width * item), Saved(f"{name}: 1/rms", rows * FLOAT)]
    saved = [Saved(f"{name}: input in fp32", rows * width * FLOAT), Saved(f"{name}: 1/rms", rows * FLOAT)]
    if not facts.lora_rank:
        saved.append(Saved(f"{name}: normalised", rows * width * FLOAT))
    return saved


def block_saved(facts: ModelFacts, setup: TrainingSetup, layer: int = 0) -> list[Saved]:
    """What one decoder layer keeps without recomputation."""
    config, tokens = facts.config, setup.tokens
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    item = setup.compute_bytes
    saved = []
    # the embedding's output needs no gradient when it is frozen, so neither does the first layer's norm
    if not (facts.lora_rank and layer == 0):
        saved += norm_saved("input norm", tokens, hidden, facts, setup, setup.weight_bytes)
    if facts.keeps_input("q_proj", "k_proj", "v_proj"):
        saved.append(Saved("q, k, v input", tokens * hidden * _input_bytes(facts, setup, 3)))
    if config.qk_norm:
        for name, count in (("q norm", heads), ("k norm", config.num_key_value_heads)):
            norm = norm_saved(name, tokens * count, config.head_dim, facts, setup, item)
            saved += [Saved(tensor.name, tensor.size, True) for tensor in norm]
    saved += _attention_saved(facts, setup, layer, query, key)
    saved += norm_saved("post-attention norm", tokens, hidden, facts, setup, setup.weight_bytes)
    if facts.keeps_input("gate_proj", "up_proj"):
        saved.append(Saved("gate, up input", tokens * hidden * _input_bytes(facts, setup, 2)))
    saved += [Saved(name, tokens * inner * item) for name in ("gate", "silu(gate)", "up")]
    if facts.keeps_input("down_proj"):
        saved.append(Saved("silu(gate) * up", tokens * inner * item))
    # under stage 3 the casts are the gathered weights, which are let go after each layer
    if setup.autocast and setup.sharding < 3:
        saved.append(Saved("attention weights in half precision", _cast_weights(facts, ".self_attn.") * item, True))
        saved.append(Saved("MLP weights in half precision", _cast_weights(facts, ".mlp.") * item))
    return saved


def _attention_saved(facts: ModelFacts, setup: TrainingSetup, layer: int, query: int, key: int) -> list[Saved]:
    config, tokens, item = facts.config, setup.tokens, setup.compute_bytes
    heads, window = config.num_attention_heads, config.layer_sliding_window(layer)
    saved = [Saved("attention output", tokens * query * item, True)]
    if attention_kernel(config, setup, layer) == "written out":
        # keys and values are repeated for every query head, and all of it is fp32
        saved += [Saved(f"{name} in fp32", tokens * query * FLOAT, True) for name in ("scaled q", "scaled k", "v")]
        saved.append(Saved("attention weights", tokens * setup.sequence * heads * FLOAT, True))
    else:
        saved.append(Saved("q", tokens * query * item, True))
        saved += [Saved(name, tokens * key * item, True) for name in ("k", "v")]
        saved.append(Saved("log-sum-exp of the scores", tokens * heads * FLOAT, True))
        if window is not None and window < setup.sequence:
            saved.append(Saved("mask of the window", setup.sequence**2 * item, True))
    if facts.lora_rank:
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        size = tokens * facts.lora_rank * (item if setup.autocast else FLOAT)
        saved += [Saved(f"{name}: x A", size, True) for name in attention if name in facts.lora_targets]
        saved += [Saved(f"{name}: x A", size) for name in mlp if name in facts.lora_targets]
    return saved


def _input_bytes(facts: ModelFacts, setup: TrainingSetup, layers: int) -> int:
    """Bytes of a number of a norm's output, as the linear layers that it goes into keep it together.

    Under autocast each of them casts it for itself; an adapted one keeps what it was given.
    """
    if facts.lora_rank:
        return setup.weight_bytes
    return layers * setup.compute_bytes if setup.autocast else setup.compute_bytes


def _cast_weights(facts: ModelFacts, part: str) -> int:
    """Numbers in the matrices of one layer's attention or MLP that autocast casts and autograd keeps: the unadapted ones."""
    own = [
        p for p in facts.parameters if ".layers.0." in p.name and part in p.name and p.ndim == 2 and not p.is_adapter
    ]
    return sum(p.numel for p in own if p.name.split(".")[-2] not in facts.lora_targets)


def kept_of_block(facts: ModelFacts, setup: TrainingSetup, layer: int = 0) -> list[Saved]:
    """What one decoder layer keeps until its backward pass under the setup's recomputation."""
    saved = block_saved(facts, setup, layer)
    stream = setup.tokens * facts.config.hidden_size * setup.weight_bytes
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
    rotary = 2 * setup.sequence * config.head_dim * setup.weight_bytes
    saved = [Saved("cos and sin", rotary)]
    if not facts.lora_rank:
        saved.append(Saved("token ids", tokens * INDEX))
    saved += norm_saved("final norm", tokens, config.hidden_size, facts, setup, setup.weight_bytes)
    return saved


def loss_saved(facts: ModelFacts, setup: TrainingSetup) -> list[Saved]:
    """What the loss keeps: it forms the gradients at once, in fp32."""
    config = facts.config
    saved = [Saved("index of the labels", setup.tokens * INDEX)]
    saved.append(Saved("gradient of the hidden states", setup.tokens * config.hidden_size * FLOAT))
    if not facts.lora_rank:
        saved.append(Saved("gradient of the output head", config.vocab_size * config.hidden_size * FLOAT))
    return saved


def total(saved: list[Saved]) -> int:
    """Bytes of some saved tensors."""
    return sum(tensor.size for tensor in saved)


def blocks_kept(facts: ModelFacts, setup: TrainingSetup) -> int:
    """Bytes that all decoder layers keep together."""
    kinds: dict[tuple[bool, int | None], int] = {}
    result = 0
    for layer in range(facts.config.num_hidden_layers):
        kind = (layer == 0, facts.config.layer_sliding_window(layer))
        if kind not in kinds:
            kinds[kind] = total(kept_of_block(facts, setup, layer))
        result += kinds[kind]
    return result
