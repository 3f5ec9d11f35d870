"""Bytes of the parameters that one process holds, and of what belongs to them: gradients, masters, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from arriero.training.optimizer import EMBEDDING, HEAD, LEAST_8BIT
from arriero.training.optimizers.block_quantization import BLOCK
from arriero.training.planning.activations import FLOAT, local_shape
from arriero.training.planning.pipeline import Share
from arriero.training.planning.setup import ModelFacts, Parameter, TrainingSetup


@dataclass(frozen=True)
class State:
    """Sums over some parameters, in bytes unless numbers are said. "Part" is of the matrices, "shard" a share of that part.

    Attributes:
        weights: the parts; `held` the shards.
        gradients: the parts of those trained, as autograd makes them; `gradient_shards` the shards.
        trained: numbers in the parts that are trained; `trained_shards` in the shards.
        masters: fp32 copies of the shards in half precision.
        optimizer: its state, of the shards.
    """

    weights: int = 0
    held: int = 0
    gradients: int = 0
    gradient_shards: int = 0
    trained: int = 0
    trained_shards: int = 0
    masters: int = 0
    optimizer: int = 0

    def __add__(self, other: State) -> State:
        return State(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> State:
        return State(*(getattr(self, f.name) * count for f in fields(self)))


@dataclass(frozen=True)
class Held:
    """What a process holds, by where it lies."""

    layer: State
    layers: int
    embedding: State
    norm: State
    head: State
    everywhere: State

    @cached_property
    def outside(self) -> State:
        return self.embedding + self.norm + self.head + self.everywhere

    @cached_property
    def total(self) -> State:
        return self.layer.times(self.layers) + self.outside


def held_by(facts: ModelFacts, setup: TrainingSetup, share: Share) -> Held:
    """The state of one process of the pipeline: of its first neighbours on the other axes, who hold most.

    A head that is the embedding has nothing of its own, but for a copy in the last stage of a pipeline.
    """
    layout = setup.layout
    stages = (len(share.layers), share.embedding, share.head, layout.pp > 1)
    return _held(facts, *stages, layout.tp, layout.dp_shard * layout.cp, setup.weight_bytes, setup.optimizer)


@lru_cache(maxsize=4096)
def _held(
    facts: ModelFacts,
    layers: int,
    embeds: bool,
    ends: bool,
    pipelined: bool,
    tp: int,
    shards: int,
    item: int,
    rule: str,
) -> Held:
    def of(kind: str, here: bool = True) -> State:
        return _state(facts, kind, tp, shards, item, rule) if here else State()

    head = "embedding" if facts.config.tie_word_embeddings and pipelined else "head"
    whole = _state(facts, "everywhere", 1, 1, item, rule)
    return Held(of("layer"), layers, of("embedding", embeds), of("norm", ends), of(head, ends), whole)


@lru_cache(maxsize=4096)
def _state(facts: ModelFacts, kind: str, tp: int, shards: int, weight_bytes: int, rule: str) -> State:
    found = State()
    for parameter in facts.layer if kind == "layer" else facts.outside[kind]:
        item = weight_bytes if parameter.fixed is None else parameter.fixed
        rows, *others = local_shape(parameter, facts.config, tp)
        part = rows * math.prod(others)
        shard = math.ceil(rows / shards) * math.prod(others)  # FSDP2 cuts dimension 0, by `torch.chunk`
        trained = parameter.trained
        found += State(
            weights=part * item,
            held=shard * item,
            gradients=part * item * trained,
            gradient_shards=shard * item * trained,
            trained=part * trained,
            trained_shards=shard * trained,
            masters=shard * FLOAT * (trained and item < FLOAT),
            optimizer=optimizer_bytes(parameter, rule, shard) if trained else 0,
        )
    return found


def optimizer_bytes(parameter: Parameter, rule: str, size: int | None = None) -> int:
    """Bytes of the optimizer's state of one trained parameter, master weights left out; as `Optimizer` makes it.

    Args:
        size: numbers that the process holds of it, by default all.
    """
    size, eight = parameter.numel if size is None else size, rule == "adamw_8bit"
    if rule in ("lion", "sgd", "sgd with momentum"):
        return 0 if rule == "sgd" else size * FLOAT
    if rule == "muon" and parameter.ndim == 2 and EMBEDDING not in parameter.name and HEAD not in parameter.name:
        return size * FLOAT
    if eight and parameter.numel >= LEAST_8BIT and EMBEDDING not in parameter.name:
        return 2 * (size + -(-size // BLOCK) * FLOAT)
    return 2 * size * FLOAT + FLOAT  # the step count is a tensor too
