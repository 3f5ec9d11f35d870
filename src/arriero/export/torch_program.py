"""The decoder as functions of tensors only: weights, keys and values are inputs, and new keys and values are written in place.

So a traced program holds no weight, several programs share one copy of them, and whoever calls decides where a sequence
lies. Products, keys and values are of the target's dtype, everything between them is fp32; fp32 products widen matrices that
are stored in fp16 or bf16.

weights     by name, those of `torch_weights.weight_parts`: q/k/v and gate/up are joined, the rest are an HF folder's
caches      of each layer (rows, 2 KV, context, D): a row's keys and, behind them, values
span        (L) int64, 0 to L - 1: L is the most tokens that a sequence has with the new ones, or a little more. Its size is
            what matters: an exported program takes no numbers, so a length comes as the size of a dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.export.integer_tiles import FACTORS, LEVELS, STEPS, token_rows
from arriero.export.native_operators import cached_attention, integer_product
from arriero.export.torch_target import CPU, Target
from arriero.export.weight_names import EMBEDDING
from arriero.models.config import LlamaConfig
from arriero.models.rope import rope_frequencies
from arriero.models.weight_shapes import HEAD

FREQUENCIES = "rope.frequencies"
UP, DOWN = "up", "down"  # the factors of what an adapter adds to a matrix, behind its name
Weights = Mapping[str, Tensor]


class _Decoder(nn.Module):
    """What both programs have in common; it has no parameters."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self._head = EMBEDDING if config.tie_word_embeddings else HEAD
        self._rope_factor = rope_frequencies(config)[1]
        self._groups = config.num_attention_heads // config.num_key_value_heads

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of the last dimension."""
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _angles(self, positions: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """(...) -> cos and signed sin (..., 1, D); see `arriero.models.rope.rotate`."""
        angles = positions[..., None].float() * weights[FREQUENCIES]
        cos, sin = angles.cos() * self._rope_factor, angles.sin() * self._rope_factor
        return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)

    def _heads(self, qkv: Tensor, angles: tuple[Tensor, Tensor], weights: Weights, name: str) -> tuple[Tensor, Tensor]:
        """(..., (H + 2 KV) D) -> rotated queries (..., H, D), and rotated keys and behind them values (..., 2 KV, D)."""
        config = self.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        qkv = qkv.view(*qkv.shape[:-1], heads + 2 * kv, config.head_dim)
        query, key, value = qkv.narrow(-2, 0, heads), qkv.narrow(-2, heads, kv), qkv.narrow(-2, heads + kv, kv)
        if config.qk_norm:
            query = self._norm(query, weights[f"{name}.q_norm.weight"])
            key = self._norm(key, weights[f"{name}.k_norm.weight"])
        cos, sin = angles
        both = torch.cat((query, key), -2)
        both = both * cos + both.roll(config.head_dim // 2, -1) * sin
        return both.narrow(-2, 0, heads), torch.cat((both.narrow(-2, heads, kv), value), -2)


class _Batched(_Decoder):
    """What the programs have in common that take sequences as rows of a batch."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        # by the last part of a linear layer's name
        self._outputs = {
            "qkv_proj": (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim,
            "o_proj": config.hidden_size,
            "gate_up_proj": 2 * config.intermediate_size,
            "down_proj": config.hidden_size,
            self._head.removesuffix(".weight").rpartition(".")[2]: config.vocab_size,
        }

    def _layers(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        places: Tensor,
        weights: Weights,
        caches: Sequence[Tensor],
        attend: Callable[[Tensor, Tensor, int], Tensor],
    ) -> Tensor:
        """(..., hidden_size) -> the same.

        Args:
            places: of new keys and values in the flattened cache.
            attend: of queries (..., H, D), a cache and the number of its layer.
        """
        for layer, cache in enumerate(caches):
            name = f"model.layers.{layer}"
            x = self._norm(hidden, weights[f"{name}.input_layernorm.weight"])
            qkv = self._linear(x, weights, f"{name}.self_attn.qkv_proj")
            query, new = self._heads(qkv, angles, weights, f"{name}.self_attn")
            cache.view(-1, cache.shape[3]).index_copy_(0, places, self._cast(new).reshape(-1, cache.shape[3]))
            hidden = hidden + self._linear(attend(query, cache, layer), weights, f"{name}.self_attn.o_proj")
            x = self._norm(hidden, weights[f"{name}.post_attention_layernorm.weight"])
            gate, up = self._linear(x, weights, f"{name}.mlp.gate_up_proj").chunk(2, -1)
            hidden = hidden + self._linear(F.silu(gate) * up, weights, f"{name}.mlp.down_proj")
        return hidden

    def _logits(self, hidden: Tensor, weights: Weights) -> Tensor:
        """(n, hidden_size) -> (n, vocab_size)."""
        return self._linear(
            self._norm(hidden, weights["model.norm.weight"]), weights, self._head.removesuffix(".weight")
        )

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.dtype == torch.float32 else x.to(self.dtype)

    def _product(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) fp32."""
        if self.dtype == torch.float32:
            return F.linear(x, matrix.float(), bias)
        found = F.linear(x.to(self.dtype), matrix.to(self.dtype)).float()
        return found if bias is None else found + bias

    def _linear(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        if f"{name}.weight.{LEVELS}" in weights:
            found = self._integer_product(x.flatten(0, -2), weights, name).view(*x.shape[:-1], -1)
            if f"{name}.weight.{DOWN}" in weights:
                found = found + self._update(x, weights[f"{name}.weight.{DOWN}"], weights[f"{name}.weight.{UP}"])
            return found if bias is None else found + bias
        return self._product(x, weights[f"{name}.weight"], bias)

    def _update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What an adapter adds: (..., in), (rank, in) and (rank, out) -> (..., out)."""
        return (x @ down.t()) @ up

    def _integer_product(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        """(rows, in) -> (rows, out)."""
        levels, steps, factors = (weights[f"{name}.weight.{part}"] for part in (LEVELS, STEPS, FACTORS))
        found: Tensor = integer_product(x, levels, steps, factors, self._outputs[name.rpartition(".")[2]])
        return found


class StepProgram(_Batched):
    """Any number of tokens of any number of sequences.

    tokens      (B, S) int64, rows filled up on the right
    starts      (B) int64, tokens of each sequence that came before
    wanted      (n) int64, places in the flattened tokens whose logits are returned

    `starts` + S must not go beyond the context. Returns (n, vocab_size) fp32.
    """

    def __init__(self, config: LlamaConfig, target: Target = CPU) -> None:
        super().__init__(config, target.dtype)

    def forward(
        self, tokens: Tensor, starts: Tensor, span: Tensor, wanted: Tensor, weights: Weights, caches: Sequence[Tensor]
    ) -> Tensor:
        """See the class and the file."""
        config, (batch, size) = self.config, tokens.shape
        kv, context = 2 * config.num_key_value_heads, caches[0].shape[2]
        positions = starts[:, None] + torch.arange(size, device=tokens.device)
        angles = self._angles(positions, weights)
        masks = {window: self._mask(positions, span, window) for window in self._windows()}
        rows = torch.arange(batch, device=tokens.device)[:, None] * kv + torch.arange(kv, device=tokens.device)
        places = (rows[:, None] * context + positions[..., None]).view(-1)  # of (B, S, 2 KV) in the flattened cache
        attend = partial(self._attend, length=span.shape[0], masks=masks)
        hidden = self._layers(_embedded(tokens, weights), angles, places, weights, caches, attend)
        x = hidden.view(-1, config.hidden_size).index_select(0, wanted)
        return self._logits(x, weights)

    def _windows(self) -> set[int | None]:
        return {self.config.layer_sliding_window(layer) for layer in range(self.config.num_hidden_layers)}

    def _mask(self, positions: Tensor, span: Tensor, window: int | None) -> Tensor:
        """(B, 1, G S, L), added to the scores; the queries of a key's G heads come one head after the other."""
        own = positions.repeat(1, self._groups)[..., None]
        seen = span <= own
        if window is not None:
            seen = seen & (span > own - window)
        return self._cast(torch.where(seen, 0.0, -math.inf))[:, None]

    def _attend(
        self, query: Tensor, cache: Tensor, layer: int, *, length: int, masks: Mapping[int | None, Tensor]
    ) -> Tensor:
        """Queries (B, S, H, D) -> (B, S, H D)."""
        query, mask = self._cast(query), masks[self.config.layer_sliding_window(layer)]
        batch, size, heads, head_dim = query.shape
        kv, groups = self.config.num_key_value_heads, self._groups
        # A group's heads are as good as queries of one head. The copies are explicit: whether a view would do depends on S.
        query = _copied(query.view(batch, size, kv, groups, head_dim).permute(0, 2, 3, 1, 4))
        keys, values = cache[:, :kv, :length], cache[:, kv:, :length]
        scale = head_dim**-0.5
        x = F.scaled_dot_product_attention(
            query.view(batch, kv, groups * size, head_dim), keys, values, mask, scale=scale
        )
        x = _copied(x.view(batch, kv, groups, size, head_dim).permute(0, 3, 1, 2, 4))
        return x.view(batch, size, heads * head_dim)


class RowsProgram(_Batched):
    """One token of each of any number of neighbouring sequences, for a compiler that has native code for the operators.

    tokens      (B) int64
    starts      (B) int64, tokens of each sequence that came before

    Returns (B, vocab_size) fp32.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, torch.float32)

    def forward(self, tokens: Tensor, starts: Tensor, weights: Weights, caches: Sequence[Tensor]) -> Tensor:
        """See the class and the file."""
        kv = 2 * self.config.num_key_value_heads
        rows = torch.arange(tokens.shape[0])[:, None] * kv + torch.arange(kv)
        places = (rows * caches[0].shape[2] + starts[:, None]).view(-1)  # of (B, 2 KV) in the flattened cache
        attend = partial(self._attend, starts=starts)
        hidden = self._layers(
            _embedded(tokens, weights), self._angles(starts, weights), places, weights, caches, attend
        )
        return self._logits(hidden, weights)

    def _update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """As sums, which the compiler puts into loops beside the others: for few rows a call of the BLAS costs more."""
        small = (x[:, None] * down).sum(-1)
        return (small[:, :, None] * up).sum(1)

    def _attend(self, query: Tensor, cache: Tensor, layer: int, *, starts: Tensor) -> Tensor:
        """Queries (B, H, D) -> (B, H D)."""
        window = self.config.layer_sliding_window(layer) or 0
        found: Tensor = cached_attention(query, cache, starts, window, self.config.head_dim**-0.5)
        return found.flatten(1)


class DecodeProgram(_Decoder):
    """One token of each of `rows` sequences, wherever each lies, for a compiler that fuses.

    tokens      (rows) int64
    starts      (rows) int64, tokens of each sequence that came before
    spans       of each sequence, see `span`
    caches      of each sequence, of each layer (2 KV, context, D)

    Returns (rows, vocab_size) fp32.

    A product of a matrix and a vector is written as a sum of products: compiled, it reads a matrix as fast as the memory
    gives it, 2 to 3 times as fast as the BLAS of torch on a CPU, and once for all sequences, whose sums share a loop.
    """

    def __init__(self, config: LlamaConfig, rows: int) -> None:
        super().__init__(config, torch.float32)
        self.rows = rows

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        spans: Sequence[Tensor],
        weights: Weights,
        caches: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        """See the class and the file."""
        config = self.config
        angles = [self._angles(starts[row], weights) for row in range(self.rows)]
        hidden = list(_embedded(tokens, weights).unbind(0))
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            normed = [self._norm(x, weights[f"{name}.input_layernorm.weight"]) for x in hidden]
            attended = []
            for row, qkv in enumerate(_products(normed, weights, f"{name}.self_attn.qkv_proj")):
                query, new = self._heads(qkv, angles[row], weights, f"{name}.self_attn")
                cache = caches[row][layer]
                cache.index_copy_(1, starts[row : row + 1], new[:, None])
                attended.append(self._attend(query, cache, starts[row], spans[row], layer))
            hidden = _added(hidden, _products(attended, weights, f"{name}.self_attn.o_proj"))
            normed = [self._norm(x, weights[f"{name}.post_attention_layernorm.weight"]) for x in hidden]
            halves = [x.chunk(2) for x in _products(normed, weights, f"{name}.mlp.gate_up_proj")]
            gated = [F.silu(gate) * up for gate, up in halves]
            hidden = _added(hidden, _products(gated, weights, f"{name}.mlp.down_proj"))
        normed = [self._norm(x, weights["model.norm.weight"]) for x in hidden]
        return torch.stack(_products(normed, weights, self._head.removesuffix(".weight")))

    def _attend(self, query: Tensor, cache: Tensor, start: Tensor, span: Tensor, layer: int) -> Tensor:
        """Queries (H, D) -> (H D)."""
        kv, length, window = self.config.num_key_value_heads, span.shape[0], self.config.layer_sliding_window(layer)
        mask = None if window is None else torch.where(span > start - window, 0.0, -math.inf).view(1, 1, 1, length)
        x = F.scaled_dot_product_attention(
            query.view(1, kv, self._groups, -1),
            cache[None, :kv, :length],
            cache[None, kv:, :length],
            mask if mask is None else mask.expand(1, 1, self._groups, length),
            scale=self.config.head_dim**-0.5,
        )
        return x.flatten()


def _products(inputs: Sequence[Tensor], weights: Weights, name: str) -> list[Tensor]:
    """A linear layer of each of these vectors."""
    matrix, bias = weights[f"{name}.weight"].float(), weights.get(f"{name}.bias")
    # as_strided makes the compiler store the vector first, and not compute it again for every row of the matrix
    stored = [x.as_strided(x.shape, (1,)) for x in inputs]
    found = [(x * matrix).sum(-1) for x in stored]
    return found if bias is None else [x + bias for x in found]


def _embedded(tokens: Tensor, weights: Weights) -> Tensor:
    """(...) -> (..., hidden) fp32."""
    if EMBEDDING in weights:
        return F.embedding(tokens, weights[EMBEDDING]).float()
    parts = {part: weights[f"{EMBEDDING}.{part}"] for part in (LEVELS, STEPS, FACTORS)}
    return token_rows(tokens, parts).narrow(-1, 0, weights["model.norm.weight"].shape[0])


def _added(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [one + other for one, other in zip(ones, others, strict=True)]


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
