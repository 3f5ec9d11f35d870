"""Muon: momentum whose matrices are made orthogonal (Keller Jordan, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arriero.training.optimizers.update_rule import saved_tensor
from arriero.training.optimizers.whole_matrices import WholeMatrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: the steepest at 0 that keeps singular values near 1
ITERATIONS, EPS = 5, 1e-7


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought to about 1 (0.7 to 1.2), by Newton-Schulz iterations in its own dtype."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay, for matrices of which each process may hold a box.

    The momentum stays in the boxes. Its whole matrices are made orthogonal one in each process (see `WholeMatrices`), in bf16
    on a GPU, as Jordan does, and in fp32 on a CPU, where bf16 is no faster. The rate is scaled by
    ``0.2 * sqrt(max(rows, columns))`` of the whole matrix (Liu et al. 2025, arXiv:2502.16982). A matrix without a gradient is
    stepped as one whose gradient is 0, since all processes must take part.

    Args:
        tensors: what is stepped, fp32, by parameter name.
        matrices: how they make up whole ones.
    """

    def __init__(
        self, tensors: dict[str, Tensor], matrices: WholeMatrices, *, momentum: float, weight_decay: float
    ) -> None:
        self.tensors, self.matrices, self.momentum, self.weight_decay = tensors, matrices, momentum, weight_decay
        self.buffers: dict[str, Tensor] = {}
        on_gpu = any(
            device.type == "cuda" for device in (matrices.device, *(t.device for t in tensors.values())) if device
        )
        self.dtype = torch.bfloat16 if on_gpu else torch.float32

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        if not self.buffers:
            self.buffers = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        for names in self.matrices.rounds:
            updates = {name: self._direction(name) for name in names if name in self.tensors}
            for name, update in self.matrices.work(names, updates, orthogonalized, self.dtype).items():
                tensor = self.tensors[name]
                scale = 0.2 * max(self.matrices.shapes[name]) ** 0.5
                tensor.mul_(1 - learning_rate * self.weight_decay).add_(update, alpha=-learning_rate * scale)

    def _direction(self, name: str) -> Tensor:
        """Take the gradient into the momentum, and where Nesterov's points."""
        tensor, buffer = self.tensors[name], self.buffers[name]
        gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        buffer.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum)

    def held(self) -> list[Tensor]:
        return list(self.buffers.values())

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.momentum_buffer": buffer for name, buffer in self.buffers.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            self.buffers[name] = saved_tensor(
                saved, f"{name}.momentum_buffer", tensor.shape, torch.float32, tensor.device
            )
