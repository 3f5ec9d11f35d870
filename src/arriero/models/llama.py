"""The decoder. Parameter names and layouts are those of an HF folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.models.attention import AttentionInfo, Backend, attention, put_before
from arriero.models.cache import AttendingView, CacheView
from arriero.models.config import LlamaConfig
from arriero.models.embedding_noise import EmbeddingNoise
from arriero.models.initialization import initial_values
from arriero.models.products import Linear
from arriero.models.rope import RotaryEmbedding, rotate

# cos and signed sin, (B or 1, S, 1, head_dim) each.
Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.fused = True  # torch's kernel, where it has one for the device; else the same written out

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return normed.to(x.dtype) * self.weight.to(x.dtype)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._in_three_passes(x)
        # One dtype: under autocast queries and keys are bf16 and the weight fp32, which no fused kernel takes.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def _in_three_passes(self, x: Tensor) -> Tensor:
        """For a CPU, for which torch composes its kernel of nine operations, each over memory of its own.

        A row's factor is computed in fp64: the norm is rounded already, and its square would double that.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).double()
        scale = norm.square_().mul_(1.0 / x.shape[-1]).add_(self.eps).rsqrt_().to(wide)
        normed: Tensor = (x * scale).mul_(self.weight).to(x.dtype)
        return normed


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Attributes:
        backend: None for the fastest one there is.
        prefix: gives learned keys and values, (KV, P, D) each, to attend to before the tokens' own; see
            `arriero.adapters.prefix`. With a cache they are in it already.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.backend: Backend | None = None
        self.prefix: nn.Module | None = None
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.layer_sliding_window(layer)
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary, info: AttentionInfo, cache: CacheView | None) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        batch, size, _ = x.shape
        # The head count is left to view: under tensor parallelism it is a part of the configured one.
        query = self.q_proj(x).view(batch, size, -1, self.head_dim)
        key = self.k_proj(x).view(batch, size, -1, self.head_dim)
        value = self.v_proj(x).view(batch, size, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotary).transpose(1, 2), rotate(key, *rotary).transpose(1, 2)
        value = value.transpose(1, 2)
        heads = self._attend(query, key, value, info, cache)
        output: Tensor = self.o_proj(heads.transpose(1, 2).reshape(batch, size, -1))
        return output

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, info: AttentionInfo, cache: CacheView | None
    ) -> Tensor:
        """Queries (B, H, S, D), keys and values (B, KV, S, D) of the new tokens -> (B, H, S, D)."""
        if isinstance(cache, AttendingView):
            return cache.attend(
                query, key, value, layer=self.layer, scale=self.scale, sliding_window=self.sliding_window
            )
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        elif self.prefix is not None:
            first_keys, first_values = self.prefix()
            key, value = put_before(first_keys, key, info), put_before(first_values, value, info)
        return attention(
            query, key, value, info, scale=self.scale, sliding_window=self.sliding_window, backend=self.backend
        )


class MLP(nn.Module):
    """SwiGLU feed-forward (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        attention: AttentionInfo,
        cache: CacheView | None = None,
    ) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attention, cache)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


def _embedding(rows: int, width: int) -> nn.Embedding:
    """A token embedding. On the meta device no values are drawn, for which torch would import its compiler."""
    if torch.get_default_device().type == "meta":
        empty: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(rows, width), freeze=False
        )
        return empty
    return nn.Embedding(rows, width)


class LlamaModel(nn.Module):
    """Token embedding, decoder layers, final norm.

    Attributes:
        prefix_length: keys and values that the `prefix` of every layer's attention holds.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = _embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.prefix_length = 0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        attention: AttentionInfo | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        """(B, S) int64 -> (B, S, hidden) after the final norm; see `LlamaForCausalLM.hidden_states`."""
        attention = attention or AttentionInfo.causal()
        if positions is None:
            positions = attention.positions(input_ids.shape[1], input_ids.device)
        lengths = attention.sequence_lengths(positions.device) if self.rotary.is_dynamic else None
        inputs = LayerInputs(positions, attention, cache, lengths)
        inputs = inputs.after_prefix(self.prefix_length)
        return run_layers(self.embed_tokens, self.layers.children(), self.norm, self.rotary, input_ids, inputs)


@dataclass(frozen=True)
class LayerInputs:
    """What every decoder layer is given besides the hidden states.

    Attributes:
        positions: (B or 1, S) int64.
        lengths: (B or 1, S) int64, of the sequence that each token is of; only dynamic RoPE uses them.
        real: (B, S) bool, which tokens are no padding, for who observes activations; None for all, or if nobody does.
        noise: what is added to the embeddings, in training by NEFTune.
    """

    positions: Tensor
    attention: AttentionInfo
    cache: CacheView | None = None
    lengths: Tensor | None = None
    real: Tensor | None = None
    noise: EmbeddingNoise | None = None

    def after_prefix(self, length: int) -> LayerInputs:
        """The same after `length` learned keys; with a cache they count as its first tokens, and nothing changes."""
        if length == 0 or self.cache is not None:
            return self
        lengths = None if self.lengths is None else self.lengths + length
        return replace(
            self, positions=self.positions + length, attention=self.attention.with_prefix(length), lengths=lengths
        )


def run_layers(
    embed_tokens: nn.Module | None,
    layers: Iterable[nn.Module],
    norm: nn.Module | None,
    rotary: RotaryEmbedding,
    x: Tensor,
    inputs: LayerInputs,
) -> Tensor:
    """A run of layers, with the embedding before and the norm after it where they are given.

    Args:
        x: (B, S) int64, or (B, S, hidden) without an embedding.
    """
    hidden = x if embed_tokens is None else embed_tokens(x)
    if embed_tokens is not None and inputs.noise is not None:
        hidden = inputs.noise.added_to(hidden)
    angles = rotary(inputs.positions, hidden.dtype, inputs.lengths)
    for layer in layers:
        hidden = layer(hidden, angles, inputs.attention, inputs.cache)
    output: Tensor = hidden if norm is None else norm(hidden)
    return output


class LlamaForCausalLM(nn.Module):
    """A decoder with an output head, for every family of `LlamaConfig`.

    Construction leaves torch's default values in the parameters: load a checkpoint or call `init_weights`. Under
    `torch.device("meta")` nothing is allocated.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prefix_encoder: nn.Module | None = None  # what the layers' prefixes share; see `arriero.adapters.prefix`
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output head the embedding's parameter again where the configuration ties them.

        Needed after anything that replaces parameters one by one: `to_empty`, `load_state_dict(assign=True)`.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together: a learned prefix takes positions too."""
        return self.config.max_position_embeddings - self.model.prefix_length

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fresh weights (see `arriero.models.initialization`): those of a seed are the same on every device."""
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.reset()
        for name, parameter in self.named_parameters():
            shape = tuple(parameter.shape)
            box = tuple(slice(0, size) for size in shape)
            parameter.copy_(initial_values(name, box, shape, self.config, seed))

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        attention: AttentionInfo | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        """The hidden states after the final norm.

        Args:
            input_ids: (B, S) int64.
            positions: (B or 1, S) int64; default 0 to S-1, or counted in each document.
            attention: default causal.
            cache: a view that keeps the new keys and values and attends over them and earlier ones; `positions` and
                `attention` must then be the view's.

        Returns:
            (B, S, hidden_size).
        """
        output: Tensor = self.model(input_ids, positions, attention, cache)
        return output

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        attention: AttentionInfo | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        """Logits (B, S, vocab_size); arguments as in `hidden_states`."""
        output: Tensor = self.lm_head(self.model(input_ids, positions, attention, cache))
        return output
