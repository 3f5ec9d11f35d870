"""The ranges of the inputs in quantization-aware training: where they start, and how moving averages follow the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arriero.adapters.qat import Rounding, rounding_layers
from arriero.parallel.pipeline import Stage
from arriero.parallel.placement import local_tensors
from arriero.quantization.qat import RANGE, QatSettings, is_range
from arriero.training.trainer import Callback, StepRecord, Trainer

MOMENTUM = 0.9  # what a moving average keeps of itself in a step


class ActivationRanges(Callback):
    """Sets every range before the first step, to the greatest magnitude of its layer's inputs in the rows of that step.

    That pass rounds nothing. Ranges that are moving averages take in the greatest magnitude of each step after it; learned
    ones are the optimizer's. Greatest magnitudes are those of all micro-batches and processes, without padding: they do not
    depend on the layout.
    """

    def __init__(self, settings: QatSettings) -> None:
        self.observes = settings.rounds_inputs
        self.follows = self.observes and settings.ranges == "moving_average"

    def on_train_begin(self, trainer: Trainer) -> None:
        if not self.observes:
            return
        fresh = trainer.state.step == 0
        if fresh or self.follows:
            trainer.execution.layers.marks_padding = True
            rounding = next((layer.rounding for _, layer in rounding_layers(trainer.model)), Rounding())
            handles = [
                handle
                for stage in trainer.execution.layers.stages
                for handle in _observe_during(stage, rounding, trainer.model)
            ]
        if fresh:
            rounding.on = False
            # a compiled layer would be compiled once more, for one pass
            with torch.compiler.set_stance("force_eager"):
                trainer.execution.score(list(trainer.data(0)))
            rounding.on = True
            # Through bfloat16: another order of additions, or another precision, starts from the same numbers.
            _set_ranges(trainer, lambda _, seen: float(torch.tensor(seen).bfloat16()))
        if fresh and not self.follows:
            for handle in handles:
                handle.remove()
            trainer.execution.layers.marks_padding = False

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if self.follows:
            _set_ranges(trainer, lambda old, seen: MOMENTUM * old + (1 - MOMENTUM) * seen)


def _observe_during(stage: Stage, rounding: Rounding, model: nn.Module) -> list[Any]:
    """Let layers observe in the forward passes of a stage, though not when a backward pass computes them again.

    Returns:
        The handles of the hooks.
    """

    def before(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
        if inputs is None:
            inputs = stage.micro_batches[int(kwargs["number"])]
        # not in a pass that only scores, of a reference model say; the first one of all is without gradients too
        training = model.training and (torch.is_grad_enabled() or not rounding.on)
        rounding.observing, rounding.real = training, inputs.real

    def after(*_: Any) -> None:
        rounding.observing, rounding.real = False, None

    return [
        stage.register_forward_pre_hook(before, with_kwargs=True),
        stage.register_forward_hook(after),
    ]


@torch.no_grad()
def _set_ranges(trainer: Trainer, rule: Callable[[float, float], float]) -> None:
    """Set each range from its value and from the greatest magnitude observed since; not where there was none."""
    own = {}
    for name, layer in rounding_layers(trainer.model):
        own[f"{name}.{RANGE}"] = 0.0 if layer.observed is None else float(layer.observed)
        layer.observed = None
    parallel = trainer.execution.layers.parallel
    names = sorted(filter(is_range, own if parallel is None else parallel.shapes))
    seen = dict(zip(names, trainer.processes.max([own.get(name, 0.0) for name in names]), strict=True))
    for name, tensor in local_tensors(trainer.model).items():
        if name in seen and tensor.numel() and 0.0 < seen[name] < math.inf:
            tensor.fill_(rule(float(tensor), seen[name]))
            if name in trainer.optimizer.masters:
                trainer.optimizer.masters[name].copy_(tensor)
