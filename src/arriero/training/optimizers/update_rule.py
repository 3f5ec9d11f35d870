"""What turns gradients into new weights, for a set of named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from arriero.errors import FormatError


class UpdateRule(Protocol):
    """A rule and its state; the state is a flat mapping ``{parameter}.{kind}`` of plain tensors.

    Attributes:
        tensors: what is stepped, by parameter name; the gradients are in their `grad`.
    """

    tensors: dict[str, Tensor]

    def step(self, learning_rate: float) -> None: ...

    def held(self) -> list[Tensor]:
        """The tensors kept between steps."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint stores; what it takes over again must not depend on how tensors are shared out."""
        ...

    def load(self, saved: Mapping[str, Tensor]) -> None: ...


def saved_tensor(
    saved: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A copy on `device` of one tensor of a saved state.

    Raises:
        FormatError: naming a tensor that is missing, or of another shape or dtype.
    """
    value = saved.get(name)
    hint = "was the checkpoint made with other options?"
    if value is None:
        raise FormatError(f"optimizer state: {name} is missing: {hint}")
    if tuple(value.shape) != tuple(shape):
        raise FormatError(f"optimizer state: {name} is {tuple(value.shape)}, not {tuple(shape)}: {hint}")
    if value.dtype != dtype:
        found, wanted = (str(d).removeprefix("torch.") for d in (value.dtype, dtype))
        raise FormatError(f"optimizer state: {name} is {found}, not {wanted}: was it made with another --optim?")
    return value.to(device, copy=True)


class TorchRule:
    """One of torch's own optimizers.

    Args:
        optimizer: over exactly `tensors`.
        kinds: the tensors that it keeps for each parameter; "step" is a scalar, the others have the parameter's shape.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], kinds: tuple[str, ...]) -> None:
        self.optimizer, self.tensors, self.kinds = optimizer, tensors, kinds

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def held(self) -> list[Tensor]:
        return list(self.state().values())

    def state(self) -> dict[str, Tensor]:
        held = self.optimizer.state
        return {f"{n}.{kind}": value for n, t in self.tensors.items() if t in held for kind, value in held[t].items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            entry: dict[str, Any] = {}
            for kind in self.kinds:
                shape = () if kind == "step" else tensor.shape
                entry[kind] = saved_tensor(saved, f"{name}.{kind}", shape, torch.float32, tensor.device)
            self.optimizer.state[tensor] = entry
