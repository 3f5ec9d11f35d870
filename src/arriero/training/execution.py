"""How micro-batches go through the model: one after the other, or through the stages of a pipeline.

Every loss is a sum over labelled tokens. What a process returns is its share: the sum over all processes is the whole,
whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from arriero.data.batch import Batch, to_common_shape
from arriero.models.llama import LayerInputs, LlamaForCausalLM
from arriero.parallel.context import ContextShard
from arriero.parallel.parallelize import Parallel
from arriero.parallel.pipeline import Stage
from arriero.parallel.sharding import hold_gradients
from arriero.training.loss import LossSums, VocabularyPart, linear_cross_entropy
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision


@dataclass(frozen=True)
class Sums:
    """This process's share of the sums over labelled tokens."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens)


class Execution(Protocol):
    """What trains on, or scores, a list of micro-batches."""

    layers: Layers

    @property
    def batches_at_once(self) -> int:
        """How many batches `score` is best given."""
        ...

    def train(self, batches: Sequence[Batch], label_tokens: int, optimizer: Optimizer) -> float:
        """Forward and backward of all micro-batches; the gradients are left for the optimizer.

        Args:
            label_tokens: of the whole step, in all processes: every loss is divided by it.

        Returns:
            This process's share of the mean loss.
        """
        ...

    def score(self, batches: Sequence[Batch]) -> Sums:
        """Forward passes only."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What this process computes of a micro-batch: all of it, or its part of each sequence."""

    input_ids: Tensor
    labels: Tensor
    inputs: LayerInputs


@dataclass
class Layers:
    """The stages of this process and what they need to turn batches into losses."""

    model: LlamaForCausalLM
    precision: Precision
    device: torch.device
    label_smoothing: float = 0.0
    stages: list[Stage] = field(default_factory=list)

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
            shard = ContextShard.of(
                batch, processes.group("cp"), processes.at.cp, processes.layout.cp, multiple=self.multiple
            )
            inputs = LayerInputs(shard.positions, shard.attention, shard, shard.lengths)
            return MicroBatch(shard.input_ids, shard.labels, inputs)
        attention = batch.attention()
        positions = attention.positions(batch.input_ids.shape[1], self.device)
        dynamic = self.model.model.rotary.is_dynamic
        lengths = attention.sequence_lengths(self.device) if dynamic else None
        return MicroBatch(batch.input_ids, batch.labels, LayerInputs(positions, attention, None, lengths))

    def loss(self, hidden: Tensor, labels: Tensor) -> LossSums:
        """The loss sums of the last stage's output; in every process that shares out the vocabulary they are the same."""
        head = self.stages[-1].lm_head
        assert head is not None
        tensor = self.parallel.tensor if self.parallel is not None else None
        part = None
        if tensor is not None:
            hidden = tensor.enter(hidden)
            part = VocabularyPart(tensor.group, tensor.vocabulary[0], self.model.config.vocab_size)
        return linear_cross_entropy(hidden, head.weight, labels, label_smoothing=self.label_smoothing, part=part)

    @property
    def counts(self) -> bool:
        """Whether this process's loss sums are to be counted: only one of those that have the same is."""
        return self.parallel is None or self.parallel.processes.at.tp == 0

    def share(self, sums: LossSums) -> Sums:
        return Sums(float(sums.loss), int(sums.correct), sums.tokens) if self.counts else Sums()


@dataclass
class DirectExecution:
    """One micro-batch after the other."""

    layers: Layers
    batches_at_once: int = 1

    def batch_loss(self, batch: Batch) -> LossSums:
        """The summed cross-entropy of one batch."""
        micro = self.layers.micro_batch(to_common_shape([batch], self.layers.multiple)[0])
        stage = self.layers.stages[0]
        return self.layers.loss(stage(micro.input_ids, micro.inputs), micro.labels)

    def train(self, batches: Sequence[Batch], label_tokens: int, optimizer: Optimizer) -> float:
        layers = self.layers
        total = torch.zeros((), device=layers.device)
        for number, batch in enumerate(batches):
            if layers.parallel is not None:
                hold_gradients(layers.stages[0], layers.parallel.processes.layout, last=number == len(batches) - 1)
            with layers.precision.context():
                part = self.batch_loss(batch).loss / label_tokens
            layers.precision.backward(part)
            optimizer.collect_gradients()
            total += part.detach()
        return float(total) if layers.counts else 0.0

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> Sums:
        total = Sums()
        for batch in batches:
            if batch.label_tokens or self.layers.parallel is not None:  # several processes compute together
                with self.layers.precision.context():
                    total += self.layers.share(self.batch_loss(batch))
        return total


def build_execution(
    model: LlamaForCausalLM, precision: Precision, device: torch.device, label_smoothing: float = 0.0
) -> Execution:
    """How a model's micro-batches are to be computed, from how it was shared out."""
    layers = Layers(model, precision, device, label_smoothing)
    parallel = layers.parallel
    if parallel is not None and parallel.processes.layout.pp > 1:
        from arriero.training.pipeline_execution import PipelineExecution

        return PipelineExecution(layers, parallel.processes.layout)
    return DirectExecution(layers)
