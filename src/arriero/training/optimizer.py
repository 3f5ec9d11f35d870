"""Optimizers by name, their state keyed by parameter name, with fp32 master weights where parameters are half precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from arriero.adapters.lora import adapted_layers
from arriero.config.optimization import OPTIMIZERS, OptimizationOptions
from arriero.errors import ConfigError, FormatError, TrainingError
from arriero.formats.parts import Part, Placement
from arriero.parallel.placement import local_tensor, placements
from arriero.parallel.processes import Processes
from arriero.training.optimizers.adamw_8bit import AdamW8bit
from arriero.training.optimizers.momentum import Lion, Sgd
from arriero.training.optimizers.muon import Muon
from arriero.training.optimizers.update_rule import TorchRule, UpdateRule
from arriero.training.optimizers.whole_matrices import WholeMatrices

EMBEDDING, HEAD, PREFIX = "embed_tokens", "lm_head", "prefix"
# Smaller tensors keep fp32 moments: nothing is to be gained by them (the paper's and bitsandbytes' limit).
LEAST_8BIT = 4096


class Optimizer:
    """Trains the trainable parameters of a model by one of these rules.

    - ``adamw``: AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), torch's fused kernel.
    - ``adamw_8bit``: AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861). Embeddings, and tensors
      below 4096 numbers, keep fp32 moments, as the paper advises and transformers does.
    - ``muon``: Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) for the matrices of the layers, AdamW for
      embedding, head, norms and biases. Muon's rate is scaled by ``0.2 * sqrt(max(rows, columns))``, so that its
      updates are as large as AdamW's and one learning rate and weight decay serve both (Liu et al. 2025, arXiv:2502.16982).
    - ``lion``: Lion (Chen et al. 2023, arXiv:2302.06675), one fp32 mean for each parameter.
    - ``sgd``: SGD, with or without momentum.

    Matrices decay, vectors (norm weights, biases) do not. A half-precision parameter is stepped through an fp32 copy, so
    that updates smaller than its rounding are not lost. The B matrices of adapters may have a learning rate of their own,
    with the same weight decay (Hayou et al. 2024, "LoRA+", arXiv:2402.12354): `LoRAConfig.plus_scale`.

    Raises:
        ConfigError: an unknown name.
        TrainingError: a model without trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        lion_betas: tuple[float, float] = (0.9, 0.99),
        sgd_momentum: float = 0.0,
    ) -> None:
        if name not in OPTIMIZERS:
            raise ConfigError(f"the optimizer is '{name}': one of {', '.join(OPTIMIZERS)} is needed")
        named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        parallel = getattr(model, "parallel", None)
        if not (
            named if parallel is None else parallel.trained
        ):  # this process's layers may be frozen where others' are not
            raise TrainingError("no parameter of the model is trainable")
        self.placements = {key: where for key, where in placements(model).items() if key in named}
        # a process may hold nothing of a small parameter
        self.parameters = {key: p for key, p in named.items() if local_tensor(p).numel()}
        self.local = {key: local_tensor(p) for key, p in self.parameters.items()}
        self.masters: dict[str, Tensor] = {
            key: p.detach().float() for key, p in self.local.items() if p.dtype in (torch.float16, torch.bfloat16)
        }
        self._nothing = torch.zeros(1)  # what a loss scaler looks at in a process that trains nothing
        self._nothing.grad = torch.zeros(1)
        stepped = {key: self._stepped(key) for key in self.local}
        scales = _rate_scales(model)
        self.rules: list[UpdateRule] = []
        self.scales: list[float] = []  # of each rule's learning rate
        for scale in dict.fromkeys((1.0, *scales.values())):
            group = {key: where for key, where in self.placements.items() if scales.get(key, 1.0) == scale}
            special = {key: where for key, where in group.items() if _takes(name, key, where.shape)}
            by_name = {key: tensor for key, tensor in stepped.items() if key in special}
            rest = {key: tensor for key, tensor in stepped.items() if key in group and key not in special}
            if rest:
                self.rules.append(_adamw(rest, betas, eps, weight_decay))
            if by_name and name == "adamw_8bit":
                self.rules.append(AdamW8bit(by_name, betas=betas, eps=eps, weight_decay=weight_decay))
            elif name == "muon":  # also where this process holds nothing of the matrices: it takes part in the work
                matrices = WholeMatrices(special, _processes(model))
                self.rules.append(Muon(by_name, matrices, momentum=momentum, weight_decay=weight_decay))
            elif by_name and name == "lion":
                self.rules.append(Lion(by_name, betas=lion_betas, weight_decay=weight_decay))
            elif by_name and name == "sgd":
                self.rules.append(Sgd(by_name, momentum=sgd_momentum, weight_decay=weight_decay))
            self.scales += [scale] * (len(self.rules) - len(self.scales))

    @classmethod
    def from_options(cls, model: nn.Module, options: OptimizationOptions) -> Self:
        """The optimizer that the command line asks for."""
        return cls(
            model,
            name=options.optim,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            momentum=options.muon_momentum,
            lion_betas=(options.lion_beta1, options.lion_beta2),
            sgd_momentum=options.sgd_momentum,
        )

    def _stepped(self, name: str) -> Tensor:
        return self.masters.get(name, self.local[name])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """What is stepped, in the form that `torch.amp.GradScaler.unscale_` reads."""
        return [{"params": [self._stepped(name) for name in self.parameters] or [self._nothing]}]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Hand the half-precision gradients to their masters, where they add up in fp32, and this process's shards of others
        to what is stepped; to be called after each backward."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master = self.masters.get(name)
            if master is None:
                if self.local[name] is not parameter:
                    self.local[name].grad = local_tensor(parameter.grad)
                continue
            gradient = local_tensor(parameter.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients the step will use, by parameter name."""
        stepped = {name: self._stepped(name).grad for name in self.parameters}
        return {name: grad for name, grad in stepped.items() if grad is not None}

    @torch.no_grad()
    def squared_norm(self) -> float:
        """This process's share of the squared norm of all gradients: over all processes the shares add up to it."""
        gradients = self.gradients()
        if not gradients:
            return 0.0
        tensors = list(gradients.values())
        if tensors[0].device.type == "cpu":  # torch adds up all squares of a tensor one after the other there: 1e-3 off
            tensors = [torch.linalg.vector_norm(tensor, dim=-1) if tensor.ndim > 1 else tensor for tensor in tensors]
            tensors = [tensor.double() for tensor in tensors]
        norms = torch.stack(torch._foreach_norm(tensors)).double()
        copies = torch.tensor([self.placements[name].copies for name in gradients], device=norms.device)
        return float((norms.square() / copies).sum())

    @torch.no_grad()
    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the gradients, whose norm is `norm`, down to `max_norm` (not at all if it is 0)."""
        # not finite: one bad gradient would spoil all the others; small enough: a pass over all gradients for nothing
        if max_norm > 0 and max_norm < norm < math.inf:
            gradients = list(self.gradients().values())
            if gradients:  # this process's layers may be frozen where others' are not
                torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for rule, scale in zip(self.rules, self.scales, strict=True):
            rule.step(scale * learning_rate)
        for name, master in self.masters.items():
            self.local[name].copy_(master)

    def zero_grad(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._stepped(name).grad = None

    def parts(self) -> dict[str, Part]:
        """What this process holds of every tensor of the optimizer, keyed ``{parameter}.{kind}``.

        The kinds: AdamW has ``exp_avg``, ``exp_avg_sq`` and ``step``, 8-bit AdamW too, its moments unpacked to fp32; Muon has
        ``momentum_buffer``, Lion ``exp_avg``, SGD with momentum ``velocity``. Half-precision parameters have ``master``.
        """
        tensors = {key: value for rule in self.rules for key, value in rule.state().items()}
        tensors |= {f"{name}.master": master for name, master in self.masters.items()}
        return {key: self._part(key.rpartition(".")[0], tensor) for key, tensor in tensors.items()}

    def bytes_held(self) -> int:
        """What its state takes between steps, master weights included."""
        held = [tensor for rule in self.rules for tensor in rule.held()]
        return sum(tensor.nbytes for tensor in (*held, *self.masters.values()))

    def _part(self, name: str, tensor: Tensor) -> Part:
        where = self.placements[name]
        if tuple(tensor.shape) == where.size:
            return Part(tensor, where)
        whole = Placement.whole(tuple(tensor.shape))  # a number that goes with the parameter, the same in every process
        return Part(tensor, replace(whole, writes=where.writes and not any(where.offset)))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state written by `parts`.

        Args:
            tensors: this process's part of each.

        Raises:
            FormatError: naming a tensor that is missing, or of another shape or dtype.
        """
        if any(not name.endswith(".master") for name in tensors):  # else every step so far was skipped
            for rule in self.rules:
                rule.load(tensors)
        for name, master in self.masters.items():
            if f"{name}.master" not in tensors:
                raise FormatError(
                    f"optimizer state: {name}.master is missing: was the checkpoint made in another precision?"
                )
            master.copy_(tensors[f"{name}.master"])


def _takes(rule: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a rule steps a parameter of this whole shape itself, instead of leaving it to AdamW."""
    if rule in ("lion", "sgd"):
        return True
    if PREFIX in name:  # a small table of keys and values, or what makes one
        return False
    if rule == "muon":
        return len(shape) == 2 and EMBEDDING not in name and HEAD not in name
    return rule == "adamw_8bit" and math.prod(shape) >= LEAST_8BIT and EMBEDDING not in name


def _rate_scales(model: nn.Module) -> dict[str, float]:
    """Factors on the learning rates of single parameters."""
    return {f"{name}.lora_B.weight": layer.plus_scale for name, layer in adapted_layers(model)}


def _processes(model: nn.Module) -> Processes:
    parallel = getattr(model, "parallel", None)
    return parallel.processes if parallel is not None else Processes()


def _adamw(tensors: dict[str, Tensor], betas: tuple[float, float], eps: float, weight_decay: float) -> TorchRule:
    matrices = [tensor for tensor in tensors.values() if tensor.ndim >= 2]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim < 2]
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for members, decay in groups if members],
        lr=0.0,
        betas=betas,
        eps=eps,
        fused=True,
    )
    return TorchRule(optimizer, tensors, ("step", "exp_avg", "exp_avg_sq"))
