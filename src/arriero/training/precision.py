"""Number formats of a run: fp32, or half precision in one of two ways.

O1 keeps fp32 parameters and computes in half precision (autocast). O2 keeps half-precision parameters with fp32 master
weights in the optimizer. fp16 adds dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740).
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from arriero.parallel.placement import local_tensor
from arriero.training.optimizer import Optimizer

NOTHING = "no single tensor"


class Precision:
    """How one run computes.

    Args:
        dtype: float32, bfloat16 or float16.
        level: "O1" or "O2"; without effect in float32.
        loss_scale: initial loss scale of fp16.
    """

    def __init__(self, dtype: torch.dtype, level: str, device: torch.device, loss_scale: float = 2.0**15) -> None:
        self.dtype, self.level, self.device = dtype, level, device
        self.half = dtype != torch.float32
        # with several processes an overflow in one is an overflow in all
        kind = ShardedGradScaler if dist.is_initialized() else torch.amp.GradScaler
        self.scaler = kind(device.type, init_scale=loss_scale, enabled=dtype == torch.float16)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype in which the base model is held."""
        return self.dtype if self.half and self.level == "O2" else torch.float32

    def context(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.half and self.level == "O1":
            return torch.autocast(self.device.type, dtype=self.dtype)
        return contextlib.nullcontext()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def backward(self, loss: Tensor) -> None:
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients to their true size."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]  # it reads param_groups only

    def update(self) -> None:
        """Adapt the loss scale after a step: down after an overflow, up after a long run without."""
        if self.scaler.is_enabled():
            self.scaler.update()

    @property
    def forgives_overflow(self) -> bool:
        """Whether a non-finite gradient only means that the loss scale was too high."""
        return bool(self.scaler.is_enabled()) and self.scaler.get_scale() > 1e-4

    def state(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.level}" if self.half else name


def first_non_finite_parameter(model: nn.Module) -> str:
    """The first parameter (in model order) of this process that holds a value that is not finite."""
    for name, parameter in model.named_parameters():
        held = local_tensor(parameter)
        if held.is_floating_point() and not torch.isfinite(held if held.itemsize > 1 else held.float()).all():
            return f"parameter {name}"
    return NOTHING


def first_non_finite(optimizer: Optimizer, model: nn.Module) -> str:
    """The first parameter (in model order) of this process that holds a value that is not finite, else the first such gradient.

    A broken parameter spoils the gradients of all the others, so it is looked for first.
    """
    gradients = optimizer.gradients()
    parameter = first_non_finite_parameter(model)
    if parameter != NOTHING:
        return parameter
    for name, _ in model.named_parameters():
        if name in gradients and not torch.isfinite(gradients[name]).all():
            return f"the gradient of {name}"
    return NOTHING
