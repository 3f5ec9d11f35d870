"""What is planned: a model's parameters and cost, and how it is to be trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.prefix import PrefixConfig, apply_prefix, is_prefix
from arriero.config.layout import Layout
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.tensor_split import EVERYWHERE
from arriero.quantization.choice import scheme_for
from arriero.quantization.linear import linear_layers, quantize_layers
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
        optimizer: one of `OPTIMIZERS`; with --sgd_momentum "sgd with momentum".
        device: "cpu" or "cuda": they have different kernels, which keep different tensors.
        layout: how the processes, a device each, share the work.
        reduce_dtype: in which data-parallel processes add up gradients.
        preference: the loss of pairs of answers, each two rows of `batch`; None for a loss of rows.
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
    preference: str | None = None

    @property
    def rows_each(self) -> int:
        """Rows of what `--per_device_train_batch_size` counts: a pair is two."""
        return 1 if self.preference is None else 2

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
class Method:
    """What is trained instead of all weights; by default nothing, so that all weights are.

    Attributes:
        lora_rank, lora_targets: of an adapter, and the last name parts of the layers that get one; 0 without one.
        dora: whether the rows' lengths are trained too.
        prefix_length: keys and values of each head before those of a row; 0 without a prefix.
        prefix_network: width of the network that makes them, 0 for none.
        quantize_base: how the frozen linear layers are held: "nf4", "int8", or None as they are.
    """

    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    dora: bool = False
    prefix_length: int = 0
    prefix_network: int = 0
    quantize_base: str | None = None

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights are."""
        return bool(self.lora_rank or self.prefix_length)

    def apply(self, model: LlamaForCausalLM, *, quantize: bool = True) -> None:
        """Make a model on the meta device what is trained, in place.

        Args:
            quantize: whether its linear layers are held in few bits where the method says so.
        """
        if self.quantize_base is not None and quantize:
            scheme, names = scheme_for(self.quantize_base, model.config), linear_layers(model.config)
            quantize_layers(model, lambda name, _: scheme if name in names else None)
        if self.lora_rank:
            apply_lora(model, LoRAConfig(rank=self.lora_rank, target_modules=self.lora_targets, use_dora=self.dora))
        if self.prefix_length:
            network = self.prefix_network or None
            apply_prefix(model, PrefixConfig(self.prefix_length, network is not None, network))

    def __str__(self) -> str:
        words = []
        if self.lora_rank:
            words.append(f"{'DoRA' if self.dora else 'LoRA'}, rank {self.lora_rank}")
        if self.prefix_length:
            network = f", made by a network of width {self.prefix_network}" if self.prefix_network else ""
            words.append(f"prefix of {self.prefix_length}{network}")
        if self.quantize_base is not None:
            words.append(f"base in {self.quantize_base}")
        return ", ".join(words)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: its name, shape, whether it is trained, and the bytes of a number where its type is fixed."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    fixed: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_adapter(self) -> bool:
        return ".lora_" in self.name or is_prefix(self.name)

    @property
    def everywhere(self) -> bool:
        """Whether every process holds all of it."""
        return self.name.startswith(EVERYWHERE + ".")

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
        method: what is trained of it.
    """

    config: LlamaConfig
    parameters: tuple[Parameter, ...]
    training: StepCost
    forward: StepCost
    blocks: StepCost
    attention: StepCost
    method: Method = Method()

    @property
    def total(self) -> int:
        """Of the model and what it was given to train, however they are held."""
        return self.config.num_parameters() + sum(p.numel for p in self.parameters if p.is_adapter)

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
        """Those of the "embedding", the final "norm", the "head" (a tied one only there), and those "everywhere"."""
        found: dict[str, list[Parameter]] = {"embedding": [], "norm": [], "head": [], "everywhere": []}
        for parameter in self.parameters:
            if parameter.everywhere:
                found["everywhere"].append(parameter)
            elif not parameter.in_block:
                kind = (
                    "embedding" if "embed_tokens" in parameter.name else "head" if parameter.in_vocabulary else "norm"
                )
                found[kind].append(parameter)
        return {kind: tuple(parameters) for kind, parameters in found.items()}

    @cached_property
    def largest_matrix(self) -> int:
        """Weights of the largest linear layer but the head."""
        return max(rows * columns for rows, columns in linear_layers(self.config).values())

    def keeps_input(self, *layers: str) -> bool:
        """Whether one of these linear layers needs its input for a gradient of weights."""
        return not self.method.frozen or self.adapts(*layers) > 0

    def adapts(self, *layers: str) -> int:
        """How many of these linear layers have an adapter."""
        return sum(layer in self.method.lora_targets for layer in layers) if self.method.lora_rank else 0


def model_facts(config: LlamaConfig, **trained: Any) -> ModelFacts:
    """Build a model on the meta device and read off what planning needs.

    Args:
        trained: the fields of a `Method`; none: all weights are trained.

    Raises:
        ConfigError: `lora_targets` match no layer, or a prefix or a block of few bits does not fit the model.
    """
    method = Method(**trained | {"lora_targets": tuple(trained.get("lora_targets", ()))})

    def built(*, quantize: bool) -> LlamaForCausalLM:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
            method.apply(model, quantize=quantize)
        return model

    model = built(quantize=False)  # arithmetic is that of whole weights
    held = model if method.quantize_base is None else built(quantize=True)
    parameters = tuple(
        Parameter(name, tuple(p.shape), p.requires_grad, _fixed_bytes(name, p)) for name, p in held.named_parameters()
    )
    training = step_cost(model)
    # with everything trained the forward pass is a third: one product of three
    model.requires_grad_(True)
    whole = step_cost(model)
    forward = StepCost(whole.per_token / 3, whole.per_label / 3, whole.per_pair / 3)
    attention = 2.0 * sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and ".self_attn." in name and not is_prefix(name)
    )
    return ModelFacts(
        config,
        parameters,
        training,
        forward,
        blocks=StepCost(forward.per_token, 0.0, forward.per_pair),
        attention=StepCost(attention, 0.0, forward.per_pair),
        method=method,
    )


def _fixed_bytes(name: str, parameter: torch.Tensor) -> int | None:
    """Bytes of a number that no precision option changes: of adapters, fp32, and of what is stored in few bits."""
    adapter = ".lora_" in name or is_prefix(name)
    stored = name.endswith((".weight_packed", ".weight_scale", ".weight_absmax")) or not parameter.is_floating_point()
    return parameter.element_size() if adapter or stored else None
