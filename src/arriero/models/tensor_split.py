"""How tensor parallelism cuts each weight: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3.

Matrices whose outputs are heads, feed-forward units or vocabulary are cut by rows (dimension 0), those that bring these
back to the hidden size by columns (dimension 1); everything else is whole in every process. With fewer key-value heads
than processes, each head is held by several.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.models.config import LlamaConfig

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
BY_COLUMNS = ("o_proj", "down_proj")
KEY_VALUE = ("k_proj", "v_proj")
ADAPTER_IN = {"lora_A", "lora_A0"}  # parts of adapters that have the layer's inputs only,
ADAPTER_OUT = {"lora_B", "lora_B0", "lora_magnitude_vector"}  # and its outputs only
INPUT_RANGE = "input_range"  # of a layer that rounds its inputs: one number
INPUT_SCALE = "input_scale"  # the same in a quantized layer
PREFIX = "prefix"  # of a layer's attention: keys and values (P, KV D), or matrices (KV D, Hp) and biases that make them
EVERYWHERE = "prefix_encoder"  # whole in every process, outside the stages and their shards


@dataclass(frozen=True)
class Cut:
    """One process's run of a dimension.

    Attributes:
        dim: the dimension that is cut, None for a tensor that is whole everywhere.
        start, size: the run, in elements of that dimension.
        copies: processes that hold this same run (all of them for a whole tensor).
        copy: which of these this process is, from 0.
    """

    dim: int | None
    start: int
    size: int
    copies: int
    copy: int


def possible_degrees(config: LlamaConfig) -> list[int]:
    """Numbers of processes that the heads can be shared out among: evenly, or each key-value head held by equally many."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and size of one of `parts` runs of a length, as `torch.chunk` cuts: the last ones may be shorter or empty."""
    step = -(-length // parts)
    start = min(index * step, length)
    return start, min(step, length - start)


def cut_of(name: str, shape: tuple[int, ...], config: LlamaConfig, tp: int, rank: int) -> Cut:
    """What process `rank` of `tp` holds of a parameter.

    Args:
        name: of the HF folder, or of an adapter beside it (`...q_proj.lora_A.weight`).
        shape: of the whole tensor.
    """
    parts = name.split(".")
    module = next((part for part in reversed(parts) if part in BY_ROWS or part in BY_COLUMNS), None)
    dim: int | None = None
    if parts[-1] in (INPUT_RANGE, INPUT_SCALE):
        pass
    elif module in BY_ROWS and not ADAPTER_IN & {*parts}:
        dim = 0
    elif module in BY_COLUMNS and not ADAPTER_OUT & {*parts} and parts[-1] != "bias":
        dim = 1
    elif PREFIX in parts:
        module, dim = PREFIX, 1 if parts[-1] in ("key", "value") else 0
    if dim == 1 and shape[1] == 1:  # scales of whole rows
        dim = None
    if dim is None or tp == 1:
        return Cut(None, 0, shape[0] if shape else 0, tp, rank)
    heads = config.num_key_value_heads
    if module in KEY_VALUE or module == PREFIX:
        if heads >= tp:
            start, size = chunk(heads, tp, rank)
            return Cut(dim, start * config.head_dim, size * config.head_dim, 1, 0)
        sharing = tp // heads
        return Cut(dim, rank // sharing * config.head_dim, config.head_dim, sharing, rank % sharing)
    start, size = chunk(shape[dim], tp, rank)
    return Cut(dim, start, size, 1, 0)
