"""Low-rank adaptation of the linear layers (Hu et al. 2021, "LoRA", arXiv:2106.09685, section 4.1).

A target layer computes ``y = x W^T + b + scaling * dropout(x) A^T B^T`` with ``A`` of shape (rank, in) and ``B`` of shape
(out, rank); ``A`` starts as Kaiming-uniform noise and ``B`` as zeros, so that training starts from the base model exactly.
The base weight keeps its name (``...q_proj.weight``): a checkpoint of the base loads into an adapted model unchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.errors import ConfigError, FormatError
from arriero.models.initialization import Box, drawn

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BiasMode = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly.

    Attributes:
        rank: inner dimension of the update.
        alpha: strength; the update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with `use_rslora`).
        dropout: probability of dropping an input entry of the adapter branch while training.
        target_modules: last name parts of the adapted layers, or one regular expression that the full name must match,
            or "all-linear" for every linear layer but the output head.
        bias: which biases are trained: "none", "lora_only" (those of adapted layers) or "all".
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str = field(default=DEFAULT_TARGETS)
    bias: BiasMode = "none"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora_rank is {self.rank}: a rank of at least 1 is needed")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora_dropout is {self.dropout}: a probability in [0, 1) is needed")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"lora_bias is '{self.bias}': one of none, all, lora_only is needed")

    @property
    def scaling(self) -> float:
        """Factor on the low-rank update."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def targets(self, name: str, module: nn.Module) -> bool:
        """Whether the layer with this full name is adapted."""
        if not isinstance(module, nn.Linear):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return name != "lm_head"
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith("." + target) for target in self.target_modules)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update beside it; `weight` and `bias` are the base layer's own parameters."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.dropout = config.scaling, config.dropout
        # fp32 whatever the base's dtype: the update is small and its rounding would be lost in half precision
        dtype = torch.float32 if base.weight.dtype in (torch.float16, torch.bfloat16) else base.weight.dtype
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=base.weight.device, dtype=dtype)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=base.weight.device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        if self.training and self.dropout > 0.0:
            update = F.linear(
                F.linear(F.dropout(x, self.dropout).to(self.lora_A.weight.dtype), self.lora_A.weight),
                self.lora_B.weight,
            )
            return F.linear(x, self.weight, bias) + (update * self.scaling).to(x.dtype)
        shape = x.shape[:-1]
        y: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features),
            self.weight,
            bias,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
        )
        return y.view(*shape, self.out_features)

    def delta(self) -> Tensor:
        """The update to the base weight, (out, in), in fp32."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, scaling={self.scaling}"


class _AdaptedLinear(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T`` that adds the update in place of a copy and skips the frozen weight's gradient.

    Written out, autograd would make two more (tokens, out) tensors forward and two more (tokens, in) ones backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
        low = x.to(lora_a.dtype) @ lora_a.t()
        y = F.linear(x, weight, bias)
        y.addmm_(low.to(y.dtype), lora_b.t().to(y.dtype), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.scaling, ctx.has_bias = scaling, bias is not None
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        # every product names its dtype; a pipeline's schedule may run the backward pass inside autocast
        with torch.autocast(grad.device.type, enabled=False):
            return (*_adapted_gradients(ctx, grad), None)  # type: ignore[no-untyped-call]


def _adapted_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, low = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    wide = grad.to(lora_b.dtype)
    grad_low = (wide @ lora_b).mul_(ctx.scaling)
    grad_b = (wide.t() @ low.to(wide.dtype)).mul_(ctx.scaling)
    grad_a = grad_low.t() @ x.to(lora_a.dtype)
    grad_x = None
    if needs_x:
        grad_x = grad @ weight.to(grad.dtype)
        grad_x.addmm_(grad_low.to(grad.dtype), lora_a.to(grad.dtype))
        grad_x = grad_x.to(x.dtype)
    grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype) if needs_weight else None
    grad_bias = grad.sum(0) if ctx.has_bias and needs_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def initial_values(name: str, box: Box, shape: tuple[int, ...], seed: int) -> Tensor:
    """A box of a fresh adapter matrix, fp32 on the CPU: Kaiming-uniform noise (a = sqrt(5)) for A, zeros for B."""
    if ".lora_B." in name:
        return torch.zeros(tuple(part.stop - part.start for part in box))
    bound = 1.0 / math.sqrt(shape[1])

    def draw(values: Tensor, generator: torch.Generator) -> None:
        values.uniform_(-bound, bound, generator=generator)

    return drawn(name, box, shape, seed, draw)


@torch.no_grad()
def apply_lora(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze the model and put an adapter on each target layer, in place.

    Args:
        seed: of the adapter's fresh values, which are the same in any layout of processes.

    Returns:
        The full names of the adapted layers.

    Raises:
        ConfigError: if no layer matches the targets.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [name for name, module in model.named_modules() if config.targets(name, module)]
    if not names:
        raise ConfigError(f"lora_target_modules {config.target_modules!r} match no linear layer of this model")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        base = getattr(owner, leaf)
        adapted = LoRALinear(base, config).train(base.training)
        setattr(owner, leaf, adapted)
        for matrix in ("lora_A", "lora_B"):
            weight: Tensor = getattr(adapted, matrix).weight
            box = tuple(slice(0, size) for size in weight.shape)
            weight.copy_(initial_values(f"{name}.{matrix}.weight", box, tuple(weight.shape), seed))
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias") and (
            config.bias == "all" or (config.bias == "lora_only" and isinstance(owner, LoRALinear))
        ):
            parameter.requires_grad_(True)
    return names


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under their names in the model: every A and B, and the biases that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name or p.requires_grad}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors, named as in `adapter_state`, into an adapted model.

    Raises:
        FormatError: naming the first tensor that is missing, unknown or of another shape.
    """
    own = dict(model.named_parameters())
    expected = {name for name in own if ".lora_" in name}
    for name in sorted(expected - state.keys()):
        raise FormatError(f"the adapter lacks {name}: was it trained with other target modules?")
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in own:
                raise FormatError(f"the adapter holds {name}, which this model does not have")
            if own[name].shape != tensor.shape:
                raise FormatError(
                    f"adapter tensor {name} is {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}: "
                    "is it for another base model?"
                )
            own[name].copy_(tensor)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add every update to its base weight and put plain linear layers back, in place.

    The sum is formed in fp32 and rounded once to the base's dtype.
    """
    for name, layer in list(adapted_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        layer.weight.copy_((layer.weight.float() + layer.delta()).to(layer.weight.dtype))
        linear.weight, linear.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model
