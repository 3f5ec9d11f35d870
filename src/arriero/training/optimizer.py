"""AdamW with its state keyed by parameter name, and fp32 master weights where the parameters are half precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arriero.errors import FormatError, TrainingError


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the trainable parameters of a model.

    Matrices decay, vectors (norm weights, biases) do not. A half-precision parameter is stepped through an fp32 copy, so
    that updates smaller than its rounding are not lost.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise TrainingError("no parameter of the model is trainable")
        self.parameters = named
        self.masters: dict[str, Tensor] = {
            name: p.detach().float() for name, p in named.items() if p.dtype in (torch.float16, torch.bfloat16)
        }
        decayed = [name for name, p in named.items() if p.ndim >= 2]
        plain = [name for name, p in named.items() if p.ndim < 2]
        groups = [(decayed, weight_decay), (plain, 0.0)]
        self.adamw = torch.optim.AdamW(
            [{"params": [self._stepped(n) for n in names], "weight_decay": decay} for names, decay in groups if names],
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )

    def _stepped(self, name: str) -> Tensor:
        return self.masters.get(name, self.parameters[name])

    def prepare_gradients(self) -> None:
        """Hand the half-precision gradients to their masters, in fp32; to be called once before clipping."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients the step will use, by parameter name."""
        stepped = {name: self._stepped(name).grad for name in self.parameters}
        return {name: grad for name, grad in stepped.items() if grad is not None}

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (not at all if it is 0) and return their norm before, a scalar."""
        grads = list(self.gradients().values())
        norms = torch._foreach_norm(grads)
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        # not finite: one bad gradient would spoil all the others; small enough: a pass over all gradients for nothing
        if max_norm > 0 and max_norm < float(total) < math.inf:
            torch._foreach_mul_(grads, max_norm / (total + 1e-6))
        return total

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)

    def zero_grad(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self.masters:
                self.masters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer: ``{parameter}.exp_avg``, ``.exp_avg_sq``, ``.step`` and ``.master``."""
        tensors = {}
        for name in self.parameters:
            for key, value in self.adamw.state.get(self._stepped(name), {}).items():
                tensors[f"{name}.{key}"] = value
        return tensors | {f"{name}.master": master for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state written by `state`.

        Raises:
            FormatError: naming a tensor that is missing or of another shape.
        """
        if not any(name.endswith(".exp_avg") for name in tensors):
            return self._load_masters(tensors)  # no step was taken yet: all of them were skipped
        for name in self.parameters:
            stepped = self._stepped(name)
            entry: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"{name}.{key}")
                if value is None or (key != "step" and value.shape != stepped.shape):
                    found = "is missing" if value is None else f"is {tuple(value.shape)}, not {tuple(stepped.shape)}"
                    raise FormatError(
                        f"optimizer state: {name}.{key} {found}: was the checkpoint made with other options?"
                    )
                entry[key] = value.clone() if key == "step" else value.to(stepped.device, copy=True)
            self.adamw.state[stepped] = entry
        return self._load_masters(tensors)

    def _load_masters(self, tensors: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if f"{name}.master" not in tensors:
                raise FormatError(
                    f"optimizer state: {name}.master is missing: was the checkpoint made in another precision?"
                )
            master.copy_(tensors[f"{name}.master"])
