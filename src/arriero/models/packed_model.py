"""A decoder as generation computes it: the layers of `LlamaForCausalLM`, in few large operations over packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.models.llama import DecoderLayer, LlamaForCausalLM
from arriero.models.packed_linear import MANY_ROWS, PackedGate, PackedLinear, filled, has_kernels, is_plain

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Of more tokens a layer's time is that of its products, and there is nothing to gain by compiling it.
COMPILED_TOKENS = 512


class SequenceLengths(Protocol):
    """What RoPE that depends on the length asks of packed tokens."""

    def sequence_lengths(self, device: torch.device) -> Tensor | None:
        """(1, T) int64, the length of the sequence that each token is of."""
        ...


class PackedView(Protocol):
    """A cache as packed tokens see it: it stores their keys and values, and attends."""

    def attend_packed(
        self, query: Tensor, new: Tensor, *, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """A layer's output, (T, H, D), of queries (T, H, D) and the new keys and, behind them, values (T, 2 KV, D)."""
        ...


class LinearDeltas(Protocol):
    """What adapters add to the linear layers' outputs, each for its own tokens of a packed batch."""

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
        """Let y, (T, out), which holds the base's output for x, (T, in), become the adapters', in place.

        Args:
            name: "self_attn.q_proj", ..., "mlp.down_proj".
            y: may be a slice of the columns of a wider output.
        """
        ...


class PackedModel:
    """Stands in for a `LlamaForCausalLM` that one process holds, for generation with a `PagedCache`.

    Plain linear layers of one input are computed as one. Whatever else is in the place of one (with an adapter, rounding,
    stored in few bits) is called as the module that it is. The model itself stays as it is to everybody else: weights that are
    trained or loaded later count here too, but not another module in the place of one.
    """

    def __init__(
        self, model: LlamaForCausalLM, *, copy: bool = False, join: bool = True, compile: bool = False
    ) -> None:
        """
        Args:
            copy: hold the plain linear layers' weights once more in the layout of oneDNN's kernels, which `copy_bytes` of
                memory make much faster; without effect where there are no such kernels.
            join: let the weights of q/k/v, and of gate and up, become slices of one tensor, which takes its memory anew where
                they were mapped from a file; without effect on what is copied.
            compile: of few packed tokens without `deltas`, layers are computed as torch.compile makes them, but for
                attention; then there is no copy. The first steps take long. For GPUs; on a CPU `CompiledRows` does it.
        """
        self.config = model.config
        self._model = model
        kernels = self.copy_bytes(model) > 0
        self._kernels = kernels and not compile
        self._copy = copy and self._kernels
        self._join = join or self._copy
        # with more rows oneDNN's kernels are called, which the compiler does not know
        self._compiled_tokens = (MANY_ROWS - 1 if kernels else COMPILED_TOKENS) if compile else 0
        self._parameters = [
            p for p in model.parameters() if not p.is_inference()
        ]  # the others do not say when they change
        self._packings = 0
        self._pack()

    @staticmethod
    def copy_bytes(model: LlamaForCausalLM) -> int:
        """What copies for oneDNN's kernels take; 0 where there are no such kernels."""
        weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and is_plain(layer)]
        return sum(weight.nbytes for weight in weights if has_kernels(weight.device, weight.dtype))

    def _pack(self) -> None:
        model, copy, join = self._model, self._copy, self._join
        with torch.inference_mode(False), torch.no_grad():  # parameters are to stay ordinary tensors
            layers, heads = cast("list[DecoderLayer]", model.model.layers), self.config.num_key_value_heads
            self._layers = [_PackedLayer(layer, heads, copy, join, self._compiled_tokens) for layer in layers]
            head = model.lm_head
            self._head: Callable[[Tensor], Tensor] = PackedLinear([head], copy=copy) if is_plain(head) else head
        self._state = self._values()
        self._packings += 1

    def _values(self) -> list[int]:
        """Changes whenever a parameter does."""
        return [number for p in self._parameters for number in (p.data_ptr(), p._version)]

    def refresh(self) -> int:
        """Pack the weights anew if any has changed; returns how often that was done so far."""
        if self._values() != self._state:
            self._pack()
        return self._packings

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: SequenceLengths,
        cache: PackedView,
        deltas: LinearDeltas | None = None,
    ) -> Tensor:
        """As `LlamaForCausalLM.hidden_states`, of one packed row: (1, T) int64 -> (1, T, hidden_size).

        Args:
            deltas: what adapters add to the linear layers' outputs.
        """
        self.refresh()
        model = self._model.model
        hidden: Tensor = model.embed_tokens(input_ids)[0]
        lengths = attention.sequence_lengths(positions.device) if model.rotary.is_dynamic else None
        (cos,), (sin,) = model.rotary(positions, hidden.dtype, lengths)
        tokens = len(hidden)
        if deltas is None and (self._copy or tokens >= MANY_ROWS) and self._kernels:
            hidden, cos, sin = filled(hidden), filled(cos), filled(sin)  # once, and not for each product
        for layer in self._layers:
            hidden = layer(hidden, tokens, cos, sin, cache, deltas)
        output: Tensor = model.norm(hidden[None, :tokens])
        return output

    @torch.no_grad()
    def lm_head(self, hidden: Tensor) -> Tensor:
        """(T, hidden_size) -> (T, vocab_size)."""
        return self._head(hidden)


class _PackedLayer:
    """A decoder layer over packed tokens: (rows, hidden_size) -> the same, perhaps in place; rows after the tokens fill up."""

    def __init__(self, layer: DecoderLayer, key_value_heads: int, copy: bool, join: bool, compiled_tokens: int) -> None:
        self._layer, self._key_value_heads, self._compiled_tokens = layer, key_value_heads, compiled_tokens
        attention, mlp = layer.self_attn, layer.mlp
        parts, gate = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        self._qkv = PackedLinear(parts, copy=copy) if join and is_plain(*parts) else None
        self._parts: list[Callable[[Tensor], Tensor]] = []
        if self._qkv is None:
            self._parts += [PackedLinear([x], copy=False) if is_plain(x) else partial(_called, x) for x in parts]
        self._output = PackedLinear([attention.o_proj], copy=copy) if is_plain(attention.o_proj) else None
        self._gate = PackedGate(*gate, copy=copy, join=join) if is_plain(*gate) else None
        self._down = PackedLinear([mlp.down_proj], copy=copy) if is_plain(mlp.down_proj) else None

    def __call__(
        self,
        hidden: Tensor,
        tokens: int,
        cos: Tensor,
        sin: Tensor,
        cache: PackedView,
        deltas: LinearDeltas | None,
    ) -> Tensor:
        """
        Args:
            tokens: of the rows.
            cos, sin: (rows, 1, head_dim), of `RotaryEmbedding`.
        """
        attention, kv = self._layer.self_attn, self._key_value_heads
        compiled = deltas is None and len(hidden) <= self._compiled_tokens
        before, after = _compiled() if compiled else (_PackedLayer._heads, _PackedLayer._after)
        heads = before(self, hidden, cos, sin, deltas)[:tokens]
        attended = cache.attend_packed(
            heads[:, : -2 * kv],
            heads[:, -2 * kv :],
            layer=attention.layer,
            scale=attention.scale,
            sliding_window=attention.sliding_window,
        )
        found = attended.view(tokens, -1)
        return after(self, filled(found) if len(hidden) > tokens else found, hidden, deltas)

    def _heads(self, hidden: Tensor, cos: Tensor, sin: Tensor, deltas: LinearDeltas | None) -> Tensor:
        """Queries, keys and values, (T, H + 2 KV, head_dim)."""
        attention, x = self._layer.self_attn, self._layer.input_layernorm(hidden)
        size, kv = attention.head_dim, self._key_value_heads
        qkv = self._qkv(x) if self._qkv is not None else torch.cat([part(x) for part in self._parts], dim=-1)
        if deltas is not None:
            widths = [qkv.shape[1] - 2 * kv * size, kv * size, kv * size]
            for name, y in zip(QKV, torch.split(qkv, widths, dim=-1), strict=True):
                deltas.add(attention.layer, name, x, y)
        heads = qkv.view(len(x), -1, size)
        # queries and keys lie side by side: one rotation, as `rotate` does it, is for both
        rotated = normed = heads[:, :-kv]
        if attention.q_norm is not None and attention.k_norm is not None:
            normed = torch.cat(
                (attention.q_norm(heads[:, : -2 * kv]), attention.k_norm(heads[:, -2 * kv : -kv])), dim=1
            )
        if torch.compiler.is_compiling():  # which knows no such output, and writes it in place by itself
            rotated.copy_(torch.addcmul(normed * cos, normed.roll(size // 2, dims=-1), sin))
        else:
            torch.addcmul(normed * cos, normed.roll(size // 2, dims=-1), sin, out=rotated)
        return heads

    def _after(self, attended: Tensor, hidden: Tensor, deltas: LinearDeltas | None) -> Tensor:
        """The layer's output, of what its heads found, (rows, H * head_dim)."""
        attention, mlp = self._layer.self_attn, self._layer.mlp
        hidden = self._plus("self_attn.o_proj", self._output, attention.o_proj, attended, hidden, deltas)
        inner = self._feed(self._layer.post_attention_layernorm(hidden), deltas)
        return self._plus("mlp.down_proj", self._down, mlp.down_proj, inner, hidden, deltas)

    def _feed(self, x: Tensor, deltas: LinearDeltas | None) -> Tensor:
        """(T, hidden_size) -> (T, intermediate_size)."""
        mlp, number = self._layer.mlp, self._layer.self_attn.layer
        if self._gate is not None and deltas is None:
            return self._gate(x)
        gate, up = (
            self._gate.products(x) if self._gate is not None else (_called(mlp.gate_proj, x), _called(mlp.up_proj, x))
        )
        if deltas is not None:
            deltas.add(number, "mlp.gate_proj", x, gate)
            deltas.add(number, "mlp.up_proj", x, up)
        return F.silu(gate).mul_(up)

    def _plus(
        self,
        name: str,
        packed: PackedLinear | None,
        module: nn.Module,
        x: Tensor,
        hidden: Tensor,
        deltas: LinearDeltas | None,
    ) -> Tensor:
        """A layer's output added to the hidden states."""
        if packed is not None and deltas is None:
            return packed.plus(x, hidden)
        y = packed(x) if packed is not None else _called(module, x)
        if deltas is not None:
            deltas.add(self._layer.self_attn.layer, name, x, y)
        return hidden.add_(y)


@once
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What a layer does before attention and after it, compiled once for all layers that are alike."""
    return torch.compile(_PackedLayer._heads), torch.compile(_PackedLayer._after)


def _called(module: nn.Module, x: Tensor) -> Tensor:
    """What a module that knows batches makes of packed tokens."""
    y: Tensor = module(x[None])
    return y[0]
