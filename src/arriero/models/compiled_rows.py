"""A decoder that torch.compile made for steps of a few rows on a CPU: one new token of each of a few sequences.

One function is compiled for all layers, with their weights as arguments, and one for the output head; for each number of rows
of `ROWS` anew, when a step first has it. Lengths of sequences and the cache's size are open, so that what torch keeps of it on
the disk serves other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from arriero.models.compiler import vector_lanes
from arriero.models.llama import DecoderLayer, LlamaForCausalLM
from arriero.models.packed_linear import is_plain
from arriero.models.paged_cache import PagedCache
from arriero.models.row_layer import LayerFacts, LayerTiles, RowPlaces, run_head, run_layer
from arriero.models.row_tiles import narrowest, tiled

ROWS = (1, 2, 4, 8)
# Products and sums may become one instruction, and places are known to be inside the cache.
_OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast", "assert_indirect_indexing": False}
_COPIES = count()


class CompiledRows:
    """Stands in for a `LlamaForCausalLM` in steps of up to 8 rows, with weights of its own in another layout.

    It computes in fp32 whatever the model's type: of a model in 16 bits nothing is rounded between weights and logits but the
    keys and values that the cache holds.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        """
        Args:
            model: one of which `obstacle` says nothing.
        """
        self._model = model
        self._functions: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {}
        self._lanes = vector_lanes()
        self._cache: PagedCache | None = None
        self.tile()

    @staticmethod
    def obstacle(model: LlamaForCausalLM) -> str | None:
        """Why a model on the CPU cannot be computed so, in words."""
        if not all(is_plain(layer) for layer in _linear_layers(model)):
            return "its linear layers are not plain ones (adapters, few bits)"
        return None

    @staticmethod
    def weight_bytes(model: LlamaForCausalLM) -> int:
        """What its own weights take at most; half of it where 16 bits hold the model's without loss."""
        return sum(layer.weight.nbytes for layer in _linear_layers(model))

    def tile(self) -> None:
        """Take the model's weights as they are now."""
        with torch.inference_mode(False), torch.no_grad():
            self._dtype = narrowest(layer.weight.detach() for layer in _linear_layers(self._model))
            self._layers = [self._tiles(layer) for layer in cast("list[DecoderLayer]", self._model.model.layers)]
            self._norm = _float(self._model.model.norm.weight)
            self._head = self._tiled(self._model.lm_head.weight)

    def _tiles(self, layer: DecoderLayer) -> LayerTiles:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = self._tiled(torch.cat([part.weight.detach() for part in parts]))
        biases = [_float(part.bias) for part in parts if part.bias is not None]
        return LayerTiles(
            _float(layer.input_layernorm.weight),
            qkv,
            torch.cat(biases) if biases else None,
            _float(attention.q_norm.weight) if attention.q_norm is not None else None,
            _float(attention.k_norm.weight) if attention.k_norm is not None else None,
            self._tiled(attention.o_proj.weight),
            _bias(attention.o_proj),
            _float(layer.post_attention_layernorm.weight),
            self._tiled(mlp.gate_proj.weight, mlp.up_proj.weight),
            self._tiled_bias(mlp.gate_proj),
            self._tiled_bias(mlp.up_proj),
            self._tiled(mlp.down_proj.weight),
            _bias(mlp.down_proj),
        )

    def _tiled(self, matrix: Tensor, second: Tensor | None = None) -> Tensor:
        return tiled(matrix, second, lanes=self._lanes, dtype=self._dtype)

    def _tiled_bias(self, layer: nn.Linear) -> Tensor | None:
        """As the products of half a matrix lie."""
        bias = _bias(layer)
        if bias is None:
            return None
        rows = -(-len(bias) // self._lanes)
        filled = bias.new_zeros(rows * self._lanes)
        filled[: len(bias)] = bias
        return filled.view(rows, self._lanes)

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, new: Tensor, cache: PagedCache) -> Tensor:
        """(R, vocab_size); new keys and values are written to the cache.

        Args:
            tokens, positions: (R,) int64; R is of `ROWS`.
            slots, new: see `RowPlaces`; T is at least 2.
        """
        model, config = self._model.model, self._model.config
        layer_function, head_function = self._compiled(len(tokens))
        hidden: Tensor = model.embed_tokens(tokens).float()
        lengths = positions + 1
        (cos,), (sin,) = model.rotary(positions[None], hidden.dtype, lengths[None] if model.rotary.is_dynamic else None)
        torch._dynamo.mark_dynamic(slots, 1)
        if cache is not self._cache:
            for store in (*cache.layers, *(cache.scales or ())):
                torch._dynamo.mark_dynamic(store, 1)
            self._cache = cache
        places = RowPlaces(cos, sin, slots, lengths, new)
        scale = config.head_dim**-0.5
        for number, tiles in enumerate(self._layers):
            facts = LayerFacts(config.rms_norm_eps, scale, config.layer_sliding_window(number), cache.format)
            scales = cache.scales[number] if cache.scales is not None else None
            hidden = layer_function(hidden, places, cache.layers[number], scales, tiles, facts)
        return head_function(hidden, self._norm, self._head, config.vocab_size, config.rms_norm_eps)

    def _compiled(self, rows: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        if rows not in self._functions:
            layer, head = (
                torch.compile(_copied(function), fullgraph=True, dynamic=False, options=_OPTIONS)
                for function in (run_layer, run_head)
            )
            self._functions[rows] = layer, head
        return self._functions[rows]


def _copied(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function once more: what is compiled of one counts against a limit of its own, and goes with it."""
    assert isinstance(function, FunctionType)
    # code that says the same is the same to torch
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    return FunctionType(code, function.__globals__, code.co_name)


def _linear_layers(model: LlamaForCausalLM) -> list[nn.Linear]:
    layers = cast("list[DecoderLayer]", model.model.layers)
    found: list[nn.Linear] = []
    for layer in layers:
        a, m = layer.self_attn, layer.mlp
        found += [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
    return [*found, model.lm_head]


def _float(weight: Tensor) -> Tensor:
    return weight.detach().float()


def _bias(layer: nn.Linear) -> Tensor | None:
    bias = cast("Tensor | None", layer.bias)
    return None if bias is None else _float(bias)
