"""Prefix tuning: learned keys and values before those of every layer, the model itself frozen.

Li & Liang 2021, "Prefix-Tuning", arXiv:2101.00190, with keys and values of its own in each layer as in P-tuning v2 (Liu et
al. 2021, arXiv:2110.07602). A layer has P keys and P values for each key-value head. They are what a cache of P earlier tokens
would hold: every query sees them, they get no rotary position (it would only be one more constant), and the tokens'
own positions count from P. RoPE that depends on a sequence's length counts the prefix in, and a sliding window slides past it
as past tokens. This is what PEFT computes.

Learned directly, a layer holds its keys and values. With a projection (section 4.3 of the first paper) they come out of a
small network: an embedding (P, hidden), a linear layer and a tanh that all layers share, then a linear layer of each one's
own. After training only the keys and values are needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from arriero.adapters.part_dropout import part_dropout
from arriero.errors import ConfigError, FormatError
from arriero.models.config import LlamaConfig
from arriero.models.initialization import Box, drawn
from arriero.models.llama import Attention, LlamaForCausalLM
from arriero.models.tensor_split import EVERYWHERE

ENCODER = EVERYWHERE  # the module that all layers share, and with it all processes


@dataclass(frozen=True)
class PrefixConfig:
    """What a prefix is made of.

    Attributes:
        length: keys and values of each head, P.
        projection: made by a network instead of learned directly.
        projection_size: that network's width Hp; None for the model's hidden size.
        dropout: probability of dropping an entry of the keys and values while training.
    """

    length: int = 10
    projection: bool = False
    projection_size: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"num_prefix_tokens is {self.length}: a length of at least 1 is needed")
        if self.projection_size is not None and self.projection_size < 1:
            raise ConfigError(f"prefix_projection_hidden_size is {self.projection_size}: at least 1 is needed")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"prefix_dropout is {self.dropout}: a probability in [0, 1) is needed")


class PrefixEncoder(nn.Module):
    """What the layers share of a projected prefix."""

    def __init__(self, length: int, hidden_size: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, hidden_size, device=device, dtype=torch.float32)
        self.linear = nn.Linear(hidden_size, size, device=device, dtype=torch.float32)

    def forward(self) -> Tensor:
        """(P, Hp)."""
        return torch.tanh(self.linear(self.embedding.weight))


class Prefix(nn.Module):
    """One layer's keys and values, learned directly; fp32 whatever the model's dtype, as their updates are small.

    Attributes:
        part: which part of the heads this process holds, and of how many.
    """

    def __init__(self, length: int, width: int, head_dim: int, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.part = head_dim, dropout, (0, 1)
        self.key = nn.Parameter(torch.empty(length, width, device=device, dtype=torch.float32))
        self.value = nn.Parameter(torch.empty(length, width, device=device, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (KV, P, D) each; under tensor parallelism those of this process's heads."""
        return _heads(self, self.key), _heads(self, self.value)


class ProjectedPrefix(nn.Module):
    """One layer's keys and values, made by its own last linear layer from what the shared encoder gives."""

    def __init__(self, encoder: PrefixEncoder, width: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.part = head_dim, dropout, (0, 1)
        size, device = encoder.linear.out_features, encoder.linear.weight.device
        self.key_proj = nn.Linear(size, width, device=device, dtype=torch.float32)
        self.value_proj = nn.Linear(size, width, device=device, dtype=torch.float32)
        # In a tuple it is no submodule: the encoder is the model's, not each layer's that FSDP shares out.
        self._shared = (encoder,)

    def forward(self) -> tuple[Tensor, Tensor]:
        """See `Prefix.forward`."""
        hidden = self._shared[0]().to(self.key_proj.weight.device)  # offloaded parameters are computed with elsewhere
        return _heads(self, self.key_proj(hidden)), _heads(self, self.value_proj(hidden))


def _heads(prefix: Prefix | ProjectedPrefix, flat: Tensor) -> Tensor:
    """(P, KV D) -> (KV, P, D), with dropout while training."""
    if prefix.training and prefix.dropout > 0.0:
        flat = part_dropout(flat, prefix.dropout, prefix.part)
    return flat.view(flat.shape[0], -1, prefix.head_dim).transpose(0, 1)


def is_prefix(name: str) -> bool:
    """Whether a parameter of this name is of a prefix."""
    return ".self_attn.prefix." in name or name.startswith(ENCODER + ".")


def initial_values(name: str, box: Box, shape: tuple[int, ...], config: LlamaConfig, seed: int) -> Tensor:
    """A box of a fresh prefix parameter, fp32 on the CPU.

    N(0, initializer_range) for keys and values; as torch draws them for the network: N(0, 1) for its embedding and
    U(-b, b), b = 1 / sqrt(inputs), for its matrices. Biases are 0.
    """
    if len(shape) < 2:
        return torch.zeros(box[0].stop - box[0].start)
    deviation = 1.0 if ".embedding." in name else config.initializer_range
    bound = 1.0 / math.sqrt(shape[1])

    def draw(values: Tensor, generator: torch.Generator) -> None:
        if name.endswith("_proj.weight") or ".linear." in name:
            values.uniform_(-bound, bound, generator=generator)
        else:
            values.normal_(0.0, deviation, generator=generator)

    return drawn(name, box, shape, seed, draw)


@torch.no_grad()
def apply_prefix(model: LlamaForCausalLM, config: PrefixConfig, seed: int = 0) -> None:
    """Freeze the model and put a fresh prefix before every layer's keys and values, in place.

    Args:
        seed: of the fresh values, which are the same in any layout of processes.

    Raises:
        ConfigError: a prefix that leaves no room in the model's context.
    """
    shape = model.config
    if config.length >= shape.max_position_embeddings:
        raise ConfigError(
            f"--num_prefix_tokens {config.length} fills the model's context of {shape.max_position_embeddings} "
            "(max_position_embeddings): shorten it"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    device = model.model.embed_tokens.weight.device
    width = shape.num_key_value_heads * shape.head_dim
    if config.projection:
        size = config.projection_size or shape.hidden_size
        model.prefix_encoder = PrefixEncoder(config.length, shape.hidden_size, size, device)
    for attention in prefixable(model):
        if isinstance(model.prefix_encoder, PrefixEncoder):
            attention.prefix = ProjectedPrefix(model.prefix_encoder, width, shape.head_dim, config.dropout)
        else:
            attention.prefix = Prefix(config.length, width, shape.head_dim, config.dropout, device)
        attention.prefix.train(attention.training)
    model.model.prefix_length = config.length
    for name, parameter in model.named_parameters():
        if is_prefix(name):
            box = tuple(slice(0, size) for size in parameter.shape)
            parameter.copy_(initial_values(name, box, tuple(parameter.shape), shape, seed))


def prefixable(model: nn.Module) -> Iterator[Attention]:
    """The attention of every layer that this process holds."""
    return (module for module in model.modules() if isinstance(module, Attention))


@contextlib.contextmanager
def without_prefix(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Let the stages of a model that this process holds compute as if it had no prefix."""
    held = [(attention, attention.prefix) for stage in stages for attention in prefixable(stage)]
    lengths = [(stage, stage.prefix_length) for stage in stages]
    try:
        for attention, _ in held:
            attention.prefix = None
        for stage, _ in lengths:
            stage.prefix_length = 0  # type: ignore[assignment]
        yield
    finally:
        for attention, prefix in held:
            attention.prefix = prefix
        for stage, length in lengths:
            stage.prefix_length = length


def prefix_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under their names in the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if is_prefix(name)}


@torch.no_grad()
def load_prefix_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors, named as in `prefix_state`, into a model with such a prefix.

    Raises:
        FormatError: naming the first tensor that is missing or of another shape.
    """
    for name, own in prefix_state(model).items():
        if name not in state:
            raise FormatError(f"the prefix lacks {name}: was it trained for another model?")
        if state[name].shape != own.shape:
            raise FormatError(
                f"prefix tensor {name} is {tuple(state[name].shape)}, the model needs {tuple(own.shape)}: "
                "is it for another base model?"
            )
        own.copy_(state[name])


@dataclass(frozen=True)
class PrefixKV:
    """A prefix as plain keys and values: what a cache holds before the first token.

    Attributes:
        keys, values: (KV, P, D) of each layer, by its number; of the layers and heads that this process holds.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    @property
    def length(self) -> int:
        """P."""
        return next(iter(self.keys.values())).shape[1]


@torch.no_grad()
def prefix_kv(model: nn.Module) -> PrefixKV | None:
    """A model's prefix, without dropout; None if it has none. Where FSDP shares it out, all processes must ask together."""
    keys, values = {}, {}
    for attention in prefixable(model):
        prefix = attention.prefix
        if prefix is None:
            continue
        training = prefix.training
        whole = {name: _whole(parameter) for name, parameter in prefix.named_parameters()}
        keys[attention.layer], values[attention.layer] = functional_call(prefix.eval(), whole, ())
        prefix.train(training)
    return PrefixKV(keys, values) if keys else None


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
