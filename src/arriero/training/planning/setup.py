"""What is planned: a model's parameters and cost, and how it is to be trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.config.layout import Layout
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.flops import StepCost, step_cost

Recompute = Literal["none", "core_attn", "full"]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a model is trained, as far as memory and time depend on it.

    Attributes:
        batch: rows of a micro-batch.
        sequence: tokens of a row.
        accumulation: micro-batches of an optimizer step, in each data-parallel process.
        compute_dtype, weight_dtype: as `PrecisionOptions` names them; they differ in O1.
        recompute: what is computed again in the backward pass.
        optimizer: "adamw", "adamw_8bit" or "muon".
        device: "cpu" or "cuda": they have different kernels, which keep different tensors.
        layout: how the processes, a device each, share the work.
        reduce_dtype: in which data-parallel processes add up gradients.
    """

    batch: int = 1
    sequence: int = 2048
    accumulation: int = 1
    compute_dtype: str = "float32"
    weight_dtype: str = "float32"
    recompute: Recompute = "none"
    optimizer: str = "adamw"
    device: Literal["cpu", "cuda"] = "cpu"
    layout: Layout = field(default_factory=Layout)
    reduce_dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that one device attends from."""
        return math.ceil(self.batch * self.sequence / self.layout.cp)

    @property
    def stream_tokens(self) -> int:
        """Tokens of a micro-batch that one device holds between the matrices."""
        return math.ceil(self.tokens / self.layout.tp) if self.layout.sequence_parallel else self.tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step on all devices."""
        return self.batch * self.sequence * self.accumulation * self.layout.data

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a device runs in a step; a pipeline is filled up with empty ones to what its order needs."""
        pp, schedule = self.layout.pp, self.layout.schedule
        if pp == 1:
            return self.accumulation
        if schedule in ("interleaved", "zero_bubble"):
            return math.ceil(self.accumulation / pp) * pp
        return max(self.accumulation, 2 * self.layout.stages if schedule == "zbv" else self.layout.stages)

    @property
    def reduce_bytes(self) -> int:
        """Bytes of a number of a gradient while it is added up."""
        return ITEM_BYTES[self.reduce_dtype]

    @property
    def fully_sharded(self) -> bool:
        """Whether torch's FSDP2 holds the parameters: it does with several processes, also where each has all of them."""
        return self.layout.size > 1

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

    @property
    def keeps_casts(self) -> bool:
        """Whether autograd keeps autocast's copies of the weights from the forward pass to the backward one.

        It does under stage 3 too: FSDP2 gathers weights in their own format, and what autocast makes of them is not let go.
        """
        return self.autocast

    def with_precision(self, compute: str, weight: str) -> TrainingSetup:
        return replace(self, compute_dtype=compute, weight_dtype=weight)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: its name, shape, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

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


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """A model's parameters and arithmetic, read off the model itself, built without memory on torch's meta device.

    It is compared by identity, so that what is worked out from it can be kept.

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

    @cached_property
    def layer(self) -> tuple[Parameter, ...]:
        """The parameters of one decoder layer; all have the same."""
        return tuple(parameter for parameter in self.parameters if ".layers.0." in parameter.name)

    @cached_property
    def outside(self) -> dict[str, tuple[Parameter, ...]]:
        """Those of the "embedding", the final "norm" and the "head", tied ones only in the embedding."""
        found: dict[str, list[Parameter]] = {"embedding": [], "norm": [], "head": []}
        for parameter in self.parameters:
            if not parameter.in_block:
                kind = (
                    "embedding" if "embed_tokens" in parameter.name else "head" if parameter.in_vocabulary else "norm"
                )
                found[kind].append(parameter)
        return {kind: tuple(parameters) for kind, parameters in found.items()}

    def keeps_input(self, *layers: str) -> bool:
        """Whether one of these linear layers needs its input for a gradient of weights."""
        return not self.lora_rank or any(layer in self.lora_targets for layer in layers)


def model_facts(config: LlamaConfig, *, lora_rank: int = 0, lora_targets: Sequence[str] = ()) -> ModelFacts:
    """Build a model on the meta device and read off what planning needs.

    Args:
        lora_rank: rank of an adapter that is trained instead of the weights; 0: all weights are trained.
        lora_targets: last name parts of the adapted layers.

    Raises:
        ConfigError: `lora_targets` match no layer.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        if lora_rank:
            apply_lora(model, LoRAConfig(rank=lora_rank, target_modules=tuple(lora_targets)))
    parameters = tuple(Parameter(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
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
