"""How micro-batches go through the model: one after the other, or through the stages of a pipeline.

Every loss is a sum, over labelled tokens or whatever else the objective counts. What a process returns is its share: the
sum over all processes is the whole, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from arriero.adapters.lora_linear import LoRALinear
from arriero.data.batch import Batch, PairedRows, to_common_shape
from arriero.models.embedding_noise import EmbeddingNoise
from arriero.models.llama import LayerInputs, LlamaForCausalLM
from arriero.parallel.context import ContextShard
from arriero.parallel.parallelize import Parallel
from arriero.parallel.pipeline import Stage
from arriero.parallel.sharding import hold_gradients
from arriero.training.loss import VocabularyPart
from arriero.training.objectives.cross_entropy import CrossEntropy
from arriero.training.objectives.objective import Objective, ObjectiveSums
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.row_noise import RowNoise

T = TypeVar("T")


@dataclass(frozen=True)
class Sums:
    """This process's share of an objective's sums; see `ObjectiveSums`."""

    loss: float
    count: int
    statistics: tuple[float, ...]

    @classmethod
    def nothing(cls, objective: Objective) -> Sums:
        return cls(0.0, 0, (0.0,) * len(objective.statistics))

    def __add__(self, other: Sums) -> Sums:
        statistics = tuple(a + b for a, b in zip(self.statistics, other.statistics, strict=True))
        return Sums(self.loss + other.loss, self.count + other.count, statistics)


class Execution(Protocol):
    """What trains on, or scores, a list of micro-batches."""

    layers: Layers

    @property
    def batches_at_once(self) -> int:
        """How many batches `score` is best given."""
        ...

    def train(self, batches: Sequence[Batch], count: int, optimizer: Optimizer) -> Sums:
        """Forward and backward of all micro-batches; the gradients are left for the optimizer.

        Args:
            count: of the whole step, in all processes: every loss is divided by it.

        Returns:
            This process's share of the sums.
        """
        ...

    def each(self, batches: Sequence[Batch], compute: Callable[[Tensor, MicroBatch], T]) -> list[T]:
        """Forward passes only.

        Args:
            compute: from the final hidden states of a micro-batch to what is wanted of it.

        Returns:
            That of every batch; nothing where another process has the last stage of the model.
        """
        ...

    def score(self, batches: Sequence[Batch]) -> Sums:
        """This process's share of the objective's sums, by forward passes only."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What this process computes of a micro-batch: all of it, or its part of each sequence."""

    input_ids: Tensor
    labels: Tensor
    inputs: LayerInputs
    pairs: PairedRows | None = None


@dataclass
class Layers:
    """The stages of this process and what they need to turn batches into losses.

    Attributes:
        marks_padding: whether the layers' inputs say which tokens are no padding.
        noise: what is added to the embeddings.
    """

    model: LlamaForCausalLM
    precision: Precision
    device: torch.device
    objective: Objective = field(default_factory=CrossEntropy)
    stages: list[Stage] = field(default_factory=list)
    marks_padding: bool = False
    noise: RowNoise | None = None

    def __post_init__(self) -> None:
        parallel = self.parallel
        if parallel is not None:
            self.stages = parallel.stages
        elif not self.stages:
            count = self.model.config.num_hidden_layers
            self.stages = [Stage(self.model, 0, 1, range(count))]

    @property
    def parallel(self) -> Parallel | None:
        found: Parallel | None = getattr(self.model, "parallel", None)
        return found

    @property
    def multiple(self) -> int:
        """What the tokens of a batch must be a multiple of."""
        tensor = self.parallel.tensor if self.parallel is not None else None
        return tensor.size if tensor is not None and tensor.split else 1

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """This process's part of a batch, on the device.

        Args:
            batch: whose tokens are a multiple of `multiple`.
        """
        batch = batch.to(self.device)
        parallel = self.parallel
        if parallel is not None and parallel.processes.layout.cp > 1:
            processes = parallel.processes
            cut = partial(
                ContextShard.of,
                group=processes.group("cp"),
                rank=processes.at.cp,
                size=processes.layout.cp,
                multiple=self.multiple,
                ring=processes.layout.has_ring(self.device.type),
            )
            shard = cut(batch)
            inputs = shard.inputs
            if self.marks_padding:  # cut as the labels are
                real = batch.real()
                marks = torch.ones_like(batch.labels) if real is None else real.long()
                inputs = replace(inputs, real=cut(replace(batch, labels=marks)).labels == 1)
            if self.noise is not None:
                whole = self.noise.keys_and_lengths(batch)
                inputs = self._with_noise(inputs, *(cut(replace(batch, labels=tensor)).labels for tensor in whole))
            return MicroBatch(shard.input_ids, shard.labels, inputs)
        attention = batch.attention()
        positions = attention.positions(batch.input_ids.shape[1], self.device)
        dynamic = self.model.model.rotary.is_dynamic
        lengths = attention.sequence_lengths(self.device) if dynamic else None
        real = batch.real() if self.marks_padding else None
        inputs = LayerInputs(positions, attention, None, lengths, real)
        if self.noise is not None:
            inputs = self._with_noise(inputs, *self.noise.keys_and_lengths(batch))
        return MicroBatch(batch.input_ids, batch.labels, inputs, batch.pairs)

    def _with_noise(self, inputs: LayerInputs, keys: Tensor, lengths: Tensor) -> LayerInputs:
        assert self.noise is not None
        noise = EmbeddingNoise(keys, lengths, self.noise.alpha)
        tensor = self.parallel.tensor if self.parallel is not None else None
        if tensor is not None and tensor.split:  # the embeddings come as this process's run of the tokens
            noise = noise.part(tensor.rank, tensor.size)
        return replace(inputs, noise=noise)

    def at_head(self, hidden: Tensor) -> tuple[Tensor, Tensor, VocabularyPart | None]:
        """The last stage's output, all its tokens; the head's weight; and which of its rows this process holds."""
        head: nn.Module | None = self.stages[-1].lm_head
        assert head is not None
        # an adapter of the head stays apart where the base is shared out or quantized
        weight = head.merged().to(head.base_dtype) if isinstance(head, LoRALinear) else cast("nn.Linear", head).weight
        tensor = self.parallel.tensor if self.parallel is not None else None
        if tensor is None:
            return hidden, weight, None
        part = VocabularyPart(tensor.group, tensor.vocabulary[0], self.model.config.vocab_size)
        return tensor.enter(hidden), weight, part

    def loss(self, hidden: Tensor, micro: MicroBatch) -> ObjectiveSums:
        """The sums of the last stage's output; in every process that shares out the vocabulary they are the same."""
        hidden, weight, part = self.at_head(hidden)
        return self.objective(hidden, weight, micro.labels, micro.pairs, part)

    @property
    def counts(self) -> bool:
        """Whether this process's loss sums are to be counted: only one of those that have the same is."""
        return self.parallel is None or self.parallel.processes.at.tp == 0

    def share(self, sums: ObjectiveSums) -> Sums:
        if not self.counts:
            return Sums.nothing(self.objective)
        return Sums(float(sums.loss), sums.count, tuple(sums.statistics.tolist()))

    def total(self, done: Sequence[ObjectiveSums]) -> Sums:
        """This process's share of the sums of several micro-batches."""
        return sum(map(self.share, done), Sums.nothing(self.objective))


@dataclass
class DirectExecution:
    """One micro-batch after the other."""

    layers: Layers
    batches_at_once: int = 1

    def _forward(self, batch: Batch) -> tuple[Tensor, MicroBatch]:
        micro = self.layers.micro_batch(to_common_shape([batch], self.layers.multiple)[0])
        return self.layers.stages[0](micro.input_ids, micro.inputs), micro

    def batch_loss(self, batch: Batch) -> ObjectiveSums:
        """The objective's sums of one batch."""
        return self.layers.loss(*self._forward(batch))

    def train(self, batches: Sequence[Batch], count: int, optimizer: Optimizer) -> Sums:
        layers = self.layers
        done: list[ObjectiveSums] = []
        for number, batch in enumerate(batches):
            if layers.parallel is not None:
                hold_gradients(layers.stages[0], layers.parallel.processes.layout, last=number == len(batches) - 1)
            with layers.precision.context():
                sums = self.batch_loss(batch)
                part = sums.loss / count
            layers.precision.backward(part)
            optimizer.collect_gradients()
            done.append(sums.without_graph())
        return layers.total(done)

    @torch.no_grad()
    def each(self, batches: Sequence[Batch], compute: Callable[[Tensor, MicroBatch], T]) -> list[T]:
        found = []
        for batch in batches:
            with self.layers.precision.context():
                found.append(compute(*self._forward(batch)))
        return found

    def score(self, batches: Sequence[Batch]) -> Sums:
        together = self.layers.parallel is not None  # several processes compute together, on batches of padding too
        wanted = [batch for batch in batches if batch.label_tokens or together]
        return self.layers.total(self.each(wanted, self.layers.loss))


def build_execution(
    model: LlamaForCausalLM, precision: Precision, device: torch.device, objective: Objective | None = None
) -> Execution:
    """How a model's micro-batches are to be computed, from how it was shared out."""
    layers = Layers(model, precision, device, objective or CrossEntropy())
    parallel = layers.parallel
    if parallel is not None and parallel.processes.layout.pp > 1:
        from arriero.training.pipeline_execution import PipelineExecution

        return PipelineExecution(layers, parallel.processes.layout)
    return DirectExecution(layers)
