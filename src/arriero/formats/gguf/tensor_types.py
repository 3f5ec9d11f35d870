"""The number formats of a GGUF file that can be written, and which tensor gets which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from arriero.errors import FormatError
from arriero.models.config import LlamaConfig


class TensorType(NamedTuple):
    """A ggml type.

    Attributes:
        name: as ggml calls it.
        number: in the file.
        block: how many numbers of a row are stored together.
        nbytes: of a block.
    """

    name: str
    number: int
    block: int
    nbytes: int


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
BF16 = TensorType("BF16", 30, 1, 2)
Q4_0 = TensorType("Q4_0", 2, 32, 18)
Q4_1 = TensorType("Q4_1", 3, 32, 20)
Q5_0 = TensorType("Q5_0", 6, 32, 22)
Q5_1 = TensorType("Q5_1", 7, 32, 24)
Q8_0 = TensorType("Q8_0", 8, 32, 34)
Q4_K = TensorType("Q4_K", 12, 256, 144)
Q5_K = TensorType("Q5_K", 13, 256, 176)
Q6_K = TensorType("Q6_K", 14, 256, 210)

PLAIN = (F32, F16, BF16)
# What takes the place of a type whose block does not divide a row (`tensor_type_fallback` of llama.cpp's
# src/llama-quant.cpp); where this one does not either, F16 does.
_FALLBACK = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


@dataclass(frozen=True)
class Kind:
    """What a whole file can be: the type of most matrices, and which others are more precise.

    Attributes:
        file_type: the number in `general.file_type` (llama.cpp's `llama_ftype`).
        base: of all matrices that no rule raises.
        mix: "S" or "M": which attention values and feed-forward outputs get more bits; "" for none.
    """

    file_type: int
    base: TensorType
    mix: str = ""


KINDS: dict[str, Kind] = {
    "f32": Kind(0, F32),
    "f16": Kind(1, F16),
    "bf16": Kind(32, BF16),
    "q8_0": Kind(7, Q8_0),
    "q6_k": Kind(18, Q6_K),
    "q5_k_m": Kind(17, Q5_K, "M"),
    "q5_k_s": Kind(16, Q5_K, "S"),
    "q5_1": Kind(9, Q5_1),
    "q5_0": Kind(8, Q5_0),
    "q4_k_m": Kind(15, Q4_K, "M"),
    "q4_k_s": Kind(14, Q4_K, "S"),
    "q4_1": Kind(3, Q4_1),
    "q4_0": Kind(2, Q4_0),
}
# As `llama-quantize` understands them.
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_VALUES_OR_DOWN = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


def parse_kind(name: str) -> Kind:
    """A kind by its name, e.g. "q4_k_m".

    Raises:
        FormatError: for another name.
    """
    kind = KINDS.get(ALIASES.get(name, name))
    if kind is None:
        raise FormatError(f"the GGUF kind {name!r} is not one of {', '.join((*KINDS, *ALIASES))}")
    return kind


def choose_type(name: str, shape: tuple[int, ...], kind: Kind, config: LlamaConfig) -> TensorType:
    """The type of one tensor, as `llama-quantize` chooses it without an importance matrix.

    One-dimensional tensors (norms, biases) stay fp32. After `llama_tensor_get_type` of llama.cpp's src/llama-quant.cpp.

    Args:
        name: its GGUF name.
        shape: in PyTorch's order.
    """
    if len(shape) < 2:
        return F32
    if kind.base in PLAIN:
        return kind.base
    return fitting(_raised(name, shape[-1], kind, config), shape[-1])


def mostly_four_bits(kind: Kind, config: LlamaConfig) -> bool:
    """Whether the matrices of most layers have 4 bits in a file of this kind."""
    chosen = choose_type("blk.0.attn_q.weight", (config.hidden_size, config.hidden_size), kind, config)
    return chosen in (Q4_K, Q4_1, Q4_0)


def fitting(wanted: TensorType, columns: int) -> TensorType:
    """`wanted`, or what stands for it in rows of a length that its blocks do not divide."""
    if columns % wanted.block == 0:
        return wanted
    other = _FALLBACK.get(wanted, F16)
    return other if columns % other.block == 0 else F16


def _raised(name: str, columns: int, kind: Kind, config: LlamaConfig) -> TensorType:
    base = kind.base
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        if columns % base.block:
            return Q8_0
        return base if base == Q8_0 else Q6_K
    match = _VALUES_OR_DOWN.fullmatch(name)
    if match is None:
        return base
    layer, layers, values = int(match[1]), config.num_hidden_layers, match[2] == "attn_v"
    chosen = base
    if kind.mix == "M" and _more_bits(layer, layers):
        chosen = Q6_K
    elif kind.mix == "S" and base == Q4_K and layer < (4 if values else layers // 8):
        chosen = Q5_K
    # Eight heads share the values of a 70 B model, so that a bit more costs nearly nothing.
    large = layers == 80 and (config.model_type == "qwen2" or config.num_attention_heads != config.num_key_value_heads)
    if values and large and config.model_type != "qwen3" and chosen == Q4_K:
        chosen = Q5_K
    return chosen


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
