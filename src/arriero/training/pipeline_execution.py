"""Micro-batches through the stages of a pipeline, by torch's schedules (`torch.distributed.pipelining`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from arriero.config.layout import Layout
from arriero.data.batch import Batch, to_common_shape
from arriero.parallel.relay import relay
from arriero.training.execution import Layers, MicroBatch, Sums, T
from arriero.training.objectives.objective import ObjectiveSums
from arriero.training.optimizer import Optimizer

LENGTH_UNIT = 64  # tokens of packed micro-batches are padded to a multiple of it
SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


@dataclass
class PipelineExecution:
    """The stages of this process, driven by a schedule.

    All micro-batches of a step are brought to one shape, which the messages between stages need, and are filled up with
    empty ones to a number that the schedule can do.
    """

    layers: Layers
    layout: Layout
    _kept: tuple[int, tuple[int, ...], Any] | None = None  # micro-batches, shape, schedule
    _micro: list[MicroBatch] = field(default_factory=list)
    _sums: list[ObjectiveSums] = field(default_factory=list)
    _divisor: int = 1

    def train(self, batches: Sequence[Batch], count: int, optimizer: Optimizer) -> Sums:
        self._divisor = count
        self.layers.precision.scaled(torch.ones((), device=self.layers.device))  # the scale is known in every process
        self._run(batches)
        optimizer.collect_gradients()
        return self.layers.total(self._sums)

    @property
    def batches_at_once(self) -> int:
        return 2 * self.layout.stages  # twice through the pipeline

    @torch.no_grad()
    def each(self, batches: Sequence[Batch], compute: Callable[[Tensor, MicroBatch], T]) -> list[T]:
        layers = self.layers
        assert layers.parallel is not None
        micro = [layers.micro_batch(batch) for batch in to_common_shape(batches, layers.multiple)]
        with layers.precision.context():
            outputs = relay(layers.parallel, [(one.input_ids, one.inputs) for one in micro])
            # none where another process has the last stage
            return [compute(hidden, one) for one, hidden in zip(micro, outputs, strict=False)]

    def score(self, batches: Sequence[Batch]) -> Sums:
        return self.layers.total(self.each(batches, self.layers.loss))

    def _run(self, batches: Sequence[Batch]) -> None:
        """Fill `_sums`, in the process that holds the last stage."""
        layers = self.layers
        count = self._count(len(batches))
        filled = [*batches, *[Batch.empty()] * (count - len(batches))]
        common = to_common_shape(filled, layers.multiple)
        if not common[0].is_matrix:  # few shapes, so that the schedule can often be kept
            unit = math.lcm(LENGTH_UNIT, layers.multiple)
            length = -(-common[0].input_ids.numel() // unit) * unit
            common = [batch.fitted(length) for batch in common]
        self._micro, self._sums = [layers.micro_batch(batch) for batch in common], []
        for stage in layers.stages:
            stage.micro_batches = [micro.inputs for micro in self._micro]
        schedule = self._schedule(count, tuple(self._micro[0].input_ids.shape))
        numbers = torch.arange(count)
        inputs: tuple[Tensor, ...] = ()
        if any(stage.is_first for stage in layers.stages):
            inputs = (torch.cat([micro.input_ids for micro in self._micro]),)
        target = numbers if any(stage.is_last for stage in layers.stages) else None
        for stage in layers.stages:  # forward passes only: the schedule runs the backward passes too
            stage.context = layers.precision.context
        schedule.step(*inputs, number=numbers, target=target, losses=[], return_outputs=False)
        for stage in layers.stages:
            stage.micro_batches, stage.context = (), contextlib.nullcontext
        self._micro = []

    def _count(self, batches: int) -> int:
        """Micro-batches that the schedule runs: no fewer than it needs, and full rounds where it wants them."""
        least = self.layout.stages
        if self.layout.schedule in ("interleaved", "zero_bubble"):
            return -(-max(batches, self.layout.pp) // self.layout.pp) * self.layout.pp
        return max(batches, 2 * least if self.layout.schedule == "zbv" else least)

    def _schedule(self, count: int, shape: tuple[int, ...]) -> Any:
        """The schedule for this many micro-batches of a shape; it is kept until another is needed."""
        if self._kept is None or self._kept[:2] != (count, shape):
            stages = [self._pipeline_stage(stage, shape) for stage in self.layers.stages]
            kind = SCHEDULES[self.layout.schedule]
            made = kind(stages[0] if kind is Schedule1F1B else stages, count, loss_fn=self._loss, scale_grads=False)
            self._kept = (count, shape, made)
        return self._kept[2]

    def _pipeline_stage(self, stage: Any, shape: tuple[int, ...]) -> PipelineStage:
        parallel = self.layers.parallel
        assert parallel is not None
        tensor, config = parallel.tensor, self.layers.model.config
        rows, tokens = shape
        if tensor is not None and tensor.split:
            tokens //= tensor.size
        hidden = torch.empty(rows, tokens, config.hidden_size, dtype=stage.dtype, device="meta", requires_grad=True)
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        return PipelineStage(
            stage,
            stage.index,
            stage.count,
            self.layers.device,
            input_args=ids if stage.is_first else hidden,
            output_args=hidden,
            group=parallel.processes.group("pp"),
        )

    def _loss(self, hidden: Tensor, number: Tensor) -> Tensor:
        with self.layers.precision.context():
            sums = self.layers.loss(hidden, self._micro[int(number)])
        self._sums.append(sums.without_graph())
        return self.layers.precision.scaled(sums.loss / self._divisor)
