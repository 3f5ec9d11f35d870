"""What a model computes from its shards as they are, and from its joined weights: two ways to the same logits.

Both compute in fp32 whatever the weights are stored in, some rows of a matrix at a time, so that they differ
by the order of additions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.formats.tensor_shards import ShardedState
from arriero.models.attention import AttentionInfo, attention
from arriero.models.llama import LlamaForCausalLM
from arriero.models.rope import RotaryEmbedding, rotate
from arriero.models.tensor_split import cut_of

Rotary = tuple[Tensor, Tensor]
_ROWS = 1024  # of a matrix that are in fp32 at a time


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in fp32."""
    y = torch.cat([F.linear(x, rows.float()) for rows in torch.split(weight, _ROWS)], dim=-1)
    return y if bias is None else y + bias.float()


@torch.inference_mode()
def whole_logits(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """(B, S) int64 -> (B, S, vocab_size) in fp32; a model of another dtype keeps its weights but computes in fp32 from now
    on."""

    def linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: _product(x, module.weight, module.bias)

    def embedding(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
        return lambda ids: F.embedding(ids, module.weight).float()

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = linear(module)  # type: ignore[method-assign, assignment]
        elif isinstance(module, nn.Embedding):
            module.forward = embedding(module)  # type: ignore[method-assign, assignment]
    logits: Tensor = model(input_ids)
    return logits


@torch.inference_mode()
def sharded_logits(shards: ShardedState, input_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits of the processes of the shards, one after the other: each multiplies with its own pieces, and what they would
    send each other is added up or put side by side.

    Args:
        input_ids: (B, S) int64.
        dtype: to round the weights to first; None leaves them as they are.

    Returns:
        (B, S, vocab_size) in fp32.
    """
    return _ShardedForward(shards, dtype).logits(input_ids)


class _ShardedForward:
    def __init__(self, shards: ShardedState, dtype: torch.dtype | None) -> None:
        self.shards, self.config, self.dtype = shards, shards.config, dtype

    def logits(self, input_ids: Tensor) -> Tensor:
        hidden = self._embed(input_ids)
        positions = AttentionInfo.causal().positions(input_ids.shape[1], input_ids.device)
        rotary = RotaryEmbedding(self.config)(positions, torch.float32)
        ranks = range(self.shards.tp)
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}."
            x = self._norm(hidden, at + "input_layernorm")
            hidden = hidden + self._total(
                at + "self_attn.o_proj", (self._heads(x, layer, rank, rotary) for rank in ranks)
            )
            x = self._norm(hidden, at + "post_attention_layernorm")
            hidden = hidden + self._total(at + "mlp.down_proj", (self._units(x, at, rank) for rank in ranks))
        x = self._norm(hidden, "model.norm")
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return torch.cat([self._linear(x, head, rank) for rank in ranks], dim=-1)

    def _piece(self, name: str, rank: int) -> Tensor:
        piece = self.shards.piece(name, rank)
        return piece if self.dtype is None else piece.to(self.dtype)

    def _linear(self, x: Tensor, module: str, rank: int) -> Tensor:
        bias = f"{module}.bias"
        return _product(
            x, self._piece(f"{module}.weight", rank), self._piece(bias, rank) if bias in self.shards.shapes else None
        )

    def _norm(self, x: Tensor, module: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self._piece(f"{module}.weight", 0).float()

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Each process looks up the tokens of its rows; the others' are zeros in it."""
        name = "model.embed_tokens.weight"
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        for rank in range(self.shards.tp):
            cut = cut_of(name, self.shards.shapes[name], self.config, self.shards.tp, rank)
            start, rows = (0, self.config.vocab_size) if cut.dim is None else (cut.start, cut.size)
            own = (input_ids >= start) & (input_ids < start + rows)
            piece = self.shards.piece(name, rank)[input_ids[own] - start]
            hidden[own] += (piece if self.dtype is None else piece.to(self.dtype)).float()
        return hidden

    def _total(self, module: str, inputs: Iterable[Tensor]) -> Tensor:
        """The sum of the processes' parts of a matrix that gives the hidden size; its bias counts once."""
        total = torch.zeros(())
        for rank, x in enumerate(inputs):
            total = total + _product(x, self._piece(f"{module}.weight", rank))
        bias = f"{module}.bias"
        return total + self._piece(bias, 0).float() if bias in self.shards.shapes else total

    def _heads(self, x: Tensor, layer: int, rank: int, rotary: Rotary) -> Tensor:
        """What a process's attention heads read, (B, S, own heads x head_dim)."""
        at = f"model.layers.{layer}.self_attn."
        query, key, value = (
            self._linear(x, at + module, rank).view(*x.shape[:2], -1, self.config.head_dim)
            for module in ("q_proj", "k_proj", "v_proj")
        )
        if self.config.qk_norm:
            query, key = self._norm(query, at + "q_norm"), self._norm(key, at + "k_norm")
        query, key = rotate(query, *rotary).transpose(1, 2), rotate(key, *rotary).transpose(1, 2)
        read = attention(
            query,
            key,
            value.transpose(1, 2),
            AttentionInfo.causal(),
            scale=self.config.head_dim**-0.5,
            sliding_window=self.config.layer_sliding_window(layer),
        )
        return read.transpose(1, 2).flatten(2)

    def _units(self, x: Tensor, at: str, rank: int) -> Tensor:
        """What a process's feed-forward units give, (B, S, own units)."""
        return F.silu(self._linear(x, at + "mlp.gate_proj", rank)) * self._linear(x, at + "mlp.up_proj", rank)
