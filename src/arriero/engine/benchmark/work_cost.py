"""What a step needs at least: floating-point operations, and bytes that must be read from memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arriero.adapters.prefix import is_prefix
from arriero.engine.runner import Work
from arriero.models.llama import LlamaForCausalLM
from arriero.models.paged_cache import PagedCache
from arriero.quantization.linear import linear_layers


@dataclass(frozen=True)
class Piece:
    """One sequence's part of a step, without its tokens.

    Attributes:
        start: the position of the first token.
        count: how many tokens.
        logits: rows of logits.
    """

    start: int
    count: int
    logits: int

    @classmethod
    def of(cls, work: Work) -> Piece:
        return cls(work.start, len(work.tokens), work.logits)


@dataclass(frozen=True)
class WorkCost:
    """Coefficients of a model's forward pass.

    Attributes:
        per_token: FLOPs of every linear layer but the head, adapters that are not merged among them, for a token: 2 a weight.
        per_logit_row: FLOPs of the head, for a position whose logits are wanted.
        per_pair: FLOPs of attention in one layer, for a query-key pair under the causal mask: 2 a number of a head, for the
            scores and again for the values.
        weight_bytes: of the weights that each step reads once: all but the embedding, of which it reads a few rows.
        kv_bytes: keys and values of a token in one layer.
        windows: of each layer, how many tokens it looks back at, its own among them; None: all.
    """

    per_token: float
    per_logit_row: float
    per_pair: float
    weight_bytes: int
    kv_bytes: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: LlamaForCausalLM, kv_dtype: str = "auto") -> WorkCost:
        """The cost of a model as it stands, in the types that it is held in.

        Args:
            kv_dtype: how keys and values are held, see `KVFormat.of`.
        """
        config = model.config
        dtype = model.model.embed_tokens.weight.dtype
        body = [*model.model.layers.named_parameters(), *model.model.layers.named_buffers()]
        body = [
            (name, tensor) for name, tensor in body if not is_prefix(name)
        ]  # once it is computed, it is in the cache
        read = [tensor for _, tensor in body] + [*model.model.norm.parameters(), *model.lm_head.parameters()]
        low_rank = sum(tensor.numel() for name, tensor in body if ".lora_" in name and tensor.ndim == 2)
        layers = range(config.num_hidden_layers)
        return cls(
            per_token=2.0 * (sum(rows * columns for rows, columns in linear_layers(config).values()) + low_rank),
            per_logit_row=2.0 * config.vocab_size * config.hidden_size,
            per_pair=4.0 * config.num_attention_heads * config.head_dim,
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in read),
            kv_bytes=PagedCache.bytes_of_block(config, 1, dtype, kv_dtype) // config.num_hidden_layers,
            windows=tuple(config.layer_sliding_window(layer) for layer in layers),
        )

    def flops(self, pieces: Iterable[Piece]) -> float:
        """FLOPs of a step."""
        total = 0.0
        for piece in pieces:
            pairs = sum(_pairs(piece, window) for window in self.windows)
            total += self.per_token * piece.count + self.per_logit_row * piece.logits + self.per_pair * pairs
        return total

    def bytes(self, pieces: Sequence[Piece]) -> float:
        """Bytes that a step reads: the weights once, and each sequence's keys and values once."""
        tokens = sum(_seen(piece, window) for piece in pieces for window in self.windows)
        return self.weight_bytes + self.kv_bytes * float(tokens)


def _seen(piece: Piece, window: int | None) -> int:
    """Tokens that the piece's queries look at together."""
    end = piece.start + piece.count
    return end if window is None else end - max(0, piece.start + 1 - window)


def _pairs(piece: Piece, window: int | None) -> int:
    """The sum over the piece's tokens of how many tokens each one sees, itself among them."""
    first, last = piece.start + 1, piece.start + piece.count
    if window is None or last <= window:
        return (first + last) * piece.count // 2
    growing = max(0, window - first)  # of them see all before them, which is less than the window
    return (2 * first + growing - 1) * growing // 2 + (piece.count - growing) * window
