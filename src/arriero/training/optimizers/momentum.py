"""Rules that keep one number for each parameter, or none: SGD and Lion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from arriero.training.optimizers.update_rule import saved_tensor


class MomentumRule(ABC):
    """What SGD and Lion have in common: a mean or sum of gradients, fp32, as its only state, and decoupled weight decay.

    Args:
        tensors: what is stepped, fp32, by parameter name.
        weight_decay: on matrices only; ``w *= 1 - rate * weight_decay``.
    """

    kind: str  # name of the state in files

    def __init__(self, tensors: dict[str, Tensor], *, weight_decay: float) -> None:
        self.tensors, self.weight_decay = tensors, weight_decay
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for name, tensor in self.tensors.items():
            if tensor.grad is None:
                continue
            update = self._direction(name, tensor.grad)
            if tensor.ndim >= 2:
                tensor.mul_(1 - learning_rate * self.weight_decay)
            tensor.add_(update, alpha=-learning_rate)

    @abstractmethod
    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        """Take a gradient into the state, and what to step against."""

    def _mean(self, name: str) -> Tensor:
        if name not in self.means:
            self.means[name] = torch.zeros_like(self.tensors[name])
        return self.means[name]

    def held(self) -> list[Tensor]:
        return list(self.means.values())

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{self.kind}": mean for name, mean in self.means.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            self.means[name] = saved_tensor(saved, f"{name}.{self.kind}", tensor.shape, torch.float32, tensor.device)


class Sgd(MomentumRule):
    """Stochastic gradient descent with momentum, as torch's: ``v = momentum * v + g``, ``w -= rate * v``.

    The weight decay stays out of the momentum ("SGDW", Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 1). Without
    momentum nothing is kept.
    """

    kind = "velocity"  # a sum: not Muon's momentum_buffer, a mean

    def __init__(self, tensors: dict[str, Tensor], *, momentum: float, weight_decay: float) -> None:
        super().__init__(tensors, weight_decay=weight_decay)
        self.momentum = momentum

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        return self._mean(name).mul_(self.momentum).add_(gradient) if self.momentum else gradient

    def load(self, saved: Mapping[str, Tensor]) -> None:
        if self.momentum:
            super().load(saved)


class Lion(MomentumRule):
    """Lion (Chen et al. 2023, arXiv:2302.06675, Algorithm 2): every number moves by the rate, against the sign of a mean.

    Wants a learning rate 3 to 10 times smaller and a weight decay as much larger than AdamW (section 5).

    Args:
        betas: of the mean that gives the sign, and of the one that is kept.
    """

    kind = "exp_avg"

    def __init__(self, tensors: dict[str, Tensor], *, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(tensors, weight_decay=weight_decay)
        self.betas = betas

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        mean = self._mean(name)
        update = mean.lerp(gradient, 1 - self.betas[0]).sign_()
        mean.lerp_(gradient, 1 - self.betas[1])
        return update
