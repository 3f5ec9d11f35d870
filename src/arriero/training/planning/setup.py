"""What is planned: a model's parameters and cost, and how it is to be trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.flops import StepCost, step_cost

Recompute = Literal["none", "core_attn", "full"]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a model is trained, as far as memory and time depend on it.

    Attributes:
        batch: rows of a micro-batch on one device.
        sequence: tokens of a row.
        accumulation: micro-batches of an optimizer step.
        compute_dtype, weight_dtype: as `PrecisionOptions` names them; they differ in O1.
        recompute: what is computed again in the backward pass.
        optimizer: "adamw", "adamw_8bit" or "muon".
        device: "cpu" or "cuda": they have different kernels, which keep different tensors.
        devices: how many train together, each on its own rows.
        sharding: 0, or the stage of ZeRO by which they share out the model's state.
    """

    batch: int = 1
    sequence: int = 2048
    accumulation: int = 1
    compute_dtype: str = "float32"
    weight_dtype: str = "float32"
    recompute: Recompute = "none"
    optimizer: str = "adamw"
    device: Literal["cpu", "cuda"] = "cpu"
    devices: int = 1
    sharding: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.batch * self.sequence

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return ITEM_BYTES[self.compute_dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, and of a number of the residual stream: the embedding's output is of its type."""
        return ITEM_BYTES[self.weight_dtype]

    @property
    def autocast(self) -> bool:
        """Whether weights are cast for every product (O1)."""
        return self.compute_dtype != self.weight_dtype

    def with_precision(self, compute: str, weight: str) -> TrainingSetup:
        return replace(self, compute_dtype=compute, weight_dtype=weight)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: its name, numbers, dimensions, and whether it is trained."""

    name: str
    numel: int
    ndim: int
    trained: bool

    @property
    def is_adapter(self) -> bool:
        """Adapters are fp32 whatever the weights are."""
        return ".lora_" in self.name

    @property
    def in_block(self) -> bool:
        return ".layers." in self.name

    @property
    def in_vocabulary(self) -> bool:
        """Whether it is the token embedding or the output head."""
        return "embed_tokens" in self.name or self.name.startswith("lm_head")


@dataclass(frozen=True)
class ModelFacts:
    """A model's parameters and arithmetic, read off the model itself, built without memory on torch's meta device.

    Attributes:
        training, forward: FLOPs of a training step and of a forward pass.
        blocks, attention: FLOPs of the forward pass of the decoder layers and of their attention alone.
        lora_rank, lora_targets: of its adapter; 0 and () without one.
    """

    config: LlamaConfig
    parameters: tuple[Parameter, ...]
    training: StepCost
    forward: StepCost
    blocks: StepCost
    attention: StepCost
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trained(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.trained)

    @property
    def vocabulary(self) -> int:
        """Parameters of the token embedding and, where it has its own, of the output head."""
        return sum(parameter.numel for parameter in self.parameters if parameter.in_vocabulary)

    def keeps_input(self, *layers: str) -> bool:
        """Whether one of these linear layers needs its input for a gradient of weights."""
        return not self.lora_rank or any(layer in self.lora_targets for layer in layers)


def model_facts(config: LlamaConfig, *, lora_rank: int = 0, lora_targets: Sequence[str] = ()) -> ModelFacts:
    """Build a model on the meta device and read off what planning needs.

    Args:
        lora_rank: rank of an adapter that is trained instead of the weights; 0: all weights are trained.
        lora_targets: last name parts of the adapted layers.

    Raises:
        ConfigError: `lora_targets` match no layer, or a matrix has more than 2^63 bytes.
    """
    with torch.device("meta"):
        try:
            model = LlamaForCausalLM(config)
        except RuntimeError as error:  # the sizes are bounded one by one, their products overflow 64 bits
            raise ConfigError("the configuration describes matrices larger than any machine can address") from error
        if lora_rank:
            apply_lora(model, LoRAConfig(rank=lora_rank, target_modules=tuple(lora_targets)))
    parameters = tuple(Parameter(name, p.numel(), p.ndim, p.requires_grad) for name, p in model.named_parameters())
    training = step_cost(model)
    # with everything trained the forward pass is a third: one product of three
    model.requires_grad_(True)
    whole = step_cost(model)
    forward = StepCost(whole.per_token / 3, whole.per_label / 3, whole.per_pair / 3)
    attention = 2.0 * sum(p.numel for p in parameters if p.ndim == 2 and ".self_attn." in p.name)
    return ModelFacts(
        config,
        parameters,
        training,
        forward,
        blocks=StepCost(forward.per_token, 0.0, forward.per_pair),
        attention=StepCost(attention, 0.0, forward.per_pair),
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets),
    )


def shared_out(size: int, setup: TrainingSetup, stage: int) -> int:
    """Bytes of one device's share of something that `stage` of ZeRO and those above it divide."""
    return math.ceil(size / setup.devices) if setup.sharding >= stage else size
