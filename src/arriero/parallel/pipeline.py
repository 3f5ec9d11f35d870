"""Pipeline parallelism: each process holds some of the decoder's layers (Narayanan et al. 2021, arXiv:2104.04473).

A stage is a run of layers; the first also embeds, the last also ends with the norm and the head. Parameter names stay those
of the whole model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from arriero.config.layout import Layout
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LayerInputs, LlamaForCausalLM, run_layers


def layer_cost(config: LlamaConfig, tokens: int) -> float:
    """Multiplications a token of one decoder layer's forward pass, for rows of so many tokens."""
    size, heads = config.hidden_size, config.head_dim
    attention = size * heads * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return attention + 3 * size * config.intermediate_size + config.num_attention_heads * heads * tokens


def split_layers(config: LlamaConfig, stages: int, tokens: int = 2048) -> list[range]:
    """The layers of each stage, so that the costliest stage costs least; the head counts, the embedding is a look-up.

    Among the splits that are equally good the early stages get the fewer layers: they hold more micro-batches.

    Raises:
        ConfigError: fewer layers than stages.
    """
    layers = config.num_hidden_layers
    if layers < stages:
        raise ConfigError(
            f"the model's {layers} layers do not fill {stages} pipeline stages (--pipeline_parallel_degree, in training times "
            f"--virtual_pp_degree): at most {layers} are possible"
        )
    head = config.vocab_size * config.hidden_size / layer_cost(config, tokens)
    # with `most` layers' worth at most in each stage, the last one has room for so many layers beside the head
    best = min(
        range(1, layers - stages + 2),
        key=lambda last: (
            max(last + head, math.ceil((layers - last) / max(stages - 1, 1))),
            abs(last - layers / stages),
        ),
    )
    last = layers if stages == 1 else best
    sizes = [(layers - last) // max(stages - 1, 1)] * (stages - 1)
    for i in range((layers - last) - sum(sizes)):
        sizes[-1 - i] += 1
    sizes.append(last)
    ends = [sum(sizes[: i + 1]) for i in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class Stage(nn.Module):
    """A run of layers, as a module: token ids or hidden states in, hidden states out (after the norm in the last stage).

    It holds the model's own modules: what is done to the one is done to the other.

    Attributes:
        micro_batches: what `forward` takes by number when a schedule calls it, which passes tensors only.
        context: of its forward passes, autocast for instance.
    """

    def __init__(self, model: LlamaForCausalLM, index: int, count: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.index, self.count = index, count
        held = dict(model.model.layers.named_children())
        self.embed_tokens = model.model.embed_tokens if index == 0 else None
        self.layers = nn.ModuleDict({str(layer): held[str(layer)] for layer in layers})
        self.norm = model.model.norm if index == count - 1 else None
        self.lm_head = model.lm_head if index == count - 1 else None
        self.rotary = model.model.rotary
        self.prefix_length = model.model.prefix_length
        self.micro_batches: Sequence[LayerInputs] = ()
        self.context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states between stages, and of every layer's norms (other weights may be quantized)."""
        norms = (p for name, p in self.layers.named_parameters() if name.endswith("input_layernorm.weight"))
        return next(norms).dtype

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def forward(self, x: Tensor, inputs: LayerInputs | None = None, *, number: Tensor | None = None) -> Tensor:
        """(B, S) int64 or (B, S, hidden) -> (B, S, hidden).

        Args:
            number: (1,) int64, which of `micro_batches` it is, instead of `inputs`.
        """
        if inputs is None:
            assert number is not None
            inputs = self.micro_batches[int(number)]
        inputs = inputs.after_prefix(self.prefix_length)
        with self.context():
            return run_layers(self.embed_tokens, self.layers.values(), self.norm, self.rotary, x, inputs)


def keep_stages(model: LlamaForCausalLM, layout: Layout, pp: int, tokens: int = 2048) -> list[Stage]:
    """Drop what other processes hold from a model on the meta device, in place, and cut the rest into stages.

    Where the head is the embedding and both ends of the pipeline need it, the last stage has a copy of its own as
    `lm_head.weight`; see `arriero.parallel.parallelize`.
    """
    runs = split_layers(model.config, layout.stages, tokens)
    mine = layout.stages_of(pp)
    layers = [layer for stage in mine for layer in runs[stage]]
    held = dict(model.model.layers.named_children())
    model.model.layers = nn.ModuleDict({str(layer): held[str(layer)] for layer in layers})  # type: ignore[assignment]
    first, last = 0 in mine, layout.stages - 1 in mine
    if model.config.tie_word_embeddings and layout.pp > 1 and last:
        weight = model.model.embed_tokens.weight
        model.lm_head.weight = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
    if not first:
        model.model.embed_tokens = None  # type: ignore[assignment]
    if not last:
        model.model.norm = None  # type: ignore[assignment]
        model.lm_head = None  # type: ignore[assignment]
    return [Stage(model, index, layout.stages, runs[index]) for index in mine]
