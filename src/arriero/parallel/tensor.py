"""Tensor parallelism: each process holds a part of every matrix (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053).

Parameters stay plain tensors, only smaller, so that every kernel, compiler and optimizer sees what it sees in one process;
the collectives stand around the attention, the feed-forward, the embedding and the head. With sequence parallelism
(Korthikanti et al. 2022, arXiv:2205.05198) the tokens between them are shared out too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.adapters.dora import DoRALinear
from arriero.adapters.lora import LoRALinear
from arriero.adapters.prefix import Prefix, ProjectedPrefix
from arriero.adapters.qat import RoundingLinear
from arriero.errors import ConfigError
from arriero.models import products
from arriero.models.config import LlamaConfig
from arriero.models.fp8_linear import Fp8Linear
from arriero.models.llama import DecoderLayer, LlamaForCausalLM
from arriero.models.tensor_split import (
    BY_COLUMNS,
    EVERYWHERE,
    INPUT_RANGE,
    KEY_VALUE,
    PREFIX,
    Cut,
    chunk,
    cut_of,
    possible_degrees,
)
from arriero.parallel.collectives import enter, leave
from arriero.quantization.linear import QuantizedLinear
from arriero.quantization.schemes import WeightScheme


@dataclass
class TensorParallel:
    """One process among those that share out the matrices.

    Attributes:
        split: whether each process holds a run of the tokens between the matrices. It is off while text is generated,
            whose steps are too short to share out.
        cuts: what this process holds of each parameter.
        partial: parameters that are whole in each process while their gradients are sums over parts of the work.
        vocabulary: first row and number of rows of this process's part of embedding and head.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    split: bool
    vocabulary: tuple[int, int] = (0, 0)
    cuts: dict[str, Cut] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """A block in which every process holds all tokens."""
        before, self.split = self.split, False
        try:
            yield
        finally:
            self.split = before

    def enter(self, x: Tensor) -> Tensor:
        entered: Tensor = enter(x, self.group, split=self.split)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        left: Tensor = leave(x, self.group, split=self.split)
        return left

    @torch.no_grad()
    def add_up_partial(self, gradients: dict[str, Tensor]) -> None:
        """Add up the gradients of `partial` over the processes, in place; all in one message."""
        names = [name for name in gradients if name in self.partial]
        if not names:
            return
        shared = {name: self._rows(gradients[name], self.cuts[name]) for name in names}
        flat = torch.cat([tensor.reshape(-1) for tensor in shared.values()])
        dist.all_reduce(flat, group=self.group)
        for name, total in zip(names, torch.split(flat, [tensor.numel() for tensor in shared.values()]), strict=True):
            wide = total.view(shared[name].shape)
            gradients[name].copy_(wide if self.cuts[name].dim is None else wide[self._slot(self.cuts[name])])

    def _slot(self, cut: Cut) -> int:
        return self.rank // cut.copies

    def _rows(self, gradient: Tensor, cut: Cut) -> Tensor:
        """A gradient in its slot among zeros, one slot for each run that several processes share."""
        if cut.dim is None:
            return gradient
        slots = gradient.new_zeros((self.size // cut.copies, *gradient.shape))
        slots[self._slot(cut)] = gradient
        return slots


_DEGREE = "--tensor_parallel_degree, in predict and serve the number of processes"


def check_heads(config: LlamaConfig, tp: int) -> None:
    """Raises ConfigError where the heads cannot be shared out, with the nearest degree that can."""
    if chunk(config.vocab_size, tp, tp - 1)[1] < 1:
        raise ConfigError(
            f"a tensor-parallel degree of {tp} leaves a process nothing of a vocabulary of {config.vocab_size}: lower it "
            f"({_DEGREE})"
        )
    valid = possible_degrees(config)
    if tp not in valid:
        nearest = min(valid, key=lambda degree: (abs(degree - tp), degree))
        raise ConfigError(
            f"a tensor-parallel degree of {tp} does not share out {config.num_attention_heads} heads with "
            f"{config.num_key_value_heads} key-value heads evenly: the nearest that does is {nearest} "
            f"(possible: {', '.join(map(str, valid))}; {_DEGREE})"
        )


def apply_tensor_parallel(model: LlamaForCausalLM, parallel: TensorParallel) -> None:
    """Cut the parameters of a model on the meta device and put the collectives in, in place."""
    config, size = model.config, parallel.size
    check_heads(config, size)
    _check_quantized(model, size)
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    for name, parameter in list(model.named_parameters()):
        cut = cut_of(name, tuple(parameter.shape), config, size, parallel.rank)
        parallel.cuts[name] = cut
        if cut.dim is not None:
            _replace(model, name, parameter, cut)
        if _is_partial(name, cut, split=parallel.split):
            parallel.partial.add(name)
    if tied:
        model.tie_weights()
    parallel.vocabulary = chunk(config.vocab_size, size, parallel.rank)
    if embedding is not None:  # else another stage of the pipeline has it
        embedding.forward = _embedding(embedding, parallel)  # type: ignore[method-assign, assignment]
    for layer in model.model.layers.children():
        assert isinstance(layer, DecoderLayer)
        lasts: tuple[nn.Module, ...] = (layer.self_attn.o_proj, layer.mlp.down_proj)
        for last in lasts:
            if isinstance(last, RoundingLinear | DoRALinear):
                last.group = parallel.group
            if isinstance(last, LoRALinear):
                last.input_part = (parallel.rank, size)
        if isinstance(prefix := layer.self_attn.prefix, Prefix | ProjectedPrefix):
            holders = min(size, config.num_key_value_heads)
            prefix.part = (parallel.rank * holders // size, holders)
        layer.self_attn.forward = _shared_out(layer.self_attn.forward, layer.self_attn.o_proj, parallel)  # type: ignore[method-assign]
        layer.mlp.forward = _shared_out(layer.mlp.forward, layer.mlp.down_proj, parallel)  # type: ignore[method-assign]


def _check_quantized(model: nn.Module, size: int) -> None:
    """Refuse to cut a quantized layer where its parts would not be layers of their own.

    Raises:
        ConfigError: if a group of columns, or a word that several integers share, would be cut.
    """
    for name, layer in model.named_modules():
        scheme = getattr(layer, "scheme", None)
        if not isinstance(scheme, WeightScheme) or name.rpartition(".")[2] not in BY_COLUMNS:
            continue
        columns, unit = int(layer.in_features), scheme.column_unit
        if columns % (size * unit):
            raise ConfigError(
                f"--tensor_parallel_degree {size} shares out the {columns} inputs of {name}, {columns / size:g} each, and "
                f"would cut its quantized groups of {unit}: lower it, use sharding or pipeline parallelism, or give the "
                "original weights"
            )
        if scheme.activation is not None and scheme.activation.dynamic:
            raise ConfigError(
                f"--tensor_parallel_degree {size}: {name} takes the range of its inputs from each token as a whole, which no "
                "process holds; use sharding or pipeline parallelism"
            )


def _replace(model: nn.Module, name: str, parameter: nn.Parameter, cut: Cut) -> None:
    """Put a smaller parameter in the place of the whole one."""
    assert cut.dim is not None
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    shape = list(parameter.shape)
    whole, shape[cut.dim] = shape[cut.dim], cut.size
    small = nn.Parameter(
        torch.empty(shape, dtype=parameter.dtype, device=parameter.device), requires_grad=parameter.requires_grad
    )
    setattr(owner, attribute, small)
    if attribute in ("weight", "weight_packed") and isinstance(owner, nn.Linear | LoRALinear | QuantizedLinear):
        if cut.dim == 0:
            owner.out_features = cut.size
        else:
            owner.in_features = owner.in_features * cut.size // whole


def _is_partial(name: str, cut: Cut, *, split: bool) -> bool:
    """Whether each process computes a part of this parameter's gradient and all hold the same parameter."""
    if cut.copies == 1:
        return False
    parts = name.split(".")
    if parts[0] == EVERYWHERE:  # added up with all processes, not only these
        return False
    if any(
        part in (*KEY_VALUE, PREFIX) for part in parts
    ):  # a head that several processes hold, each with other queries
        return True
    if any(part in ("q_norm", "k_norm") for part in parts) or ".lora_" in name or parts[-1] == INPUT_RANGE:
        return True
    return split  # norms and biases between the matrices: each process sees its run of the tokens


def _shared_out(forward: Callable[..., Tensor], last: nn.Module, parallel: TensorParallel) -> Callable[..., Tensor]:
    """A block whose last matrix gives partial sums; its bias is added once, to their total."""
    if last.bias is not None:
        last.forward = _without_bias(last)

    def run(x: Tensor, *args: Any) -> Tensor:
        y = parallel.leave(forward(parallel.enter(x), *args))
        bias: Tensor | None = last.get_parameter("bias") if last.bias is not None else None
        return y if bias is None else y + bias

    return run


def _without_bias(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if isinstance(linear, LoRALinear | RoundingLinear | QuantizedLinear | Fp8Linear):
            return linear.product(x, None)
        assert isinstance(linear, nn.Linear)
        return products.linear(x, linear.weight)

    return forward


def _embedding(embedding: nn.Embedding, parallel: TensorParallel) -> Callable[[Tensor], Tensor]:
    """Each process looks up the tokens of its part of the vocabulary; the others' rows are zeros, and they add up."""

    def forward(input_ids: Tensor) -> Tensor:
        start, size = parallel.vocabulary
        local = input_ids - start
        foreign = (local < 0) | (local >= size)
        rows = F.embedding(local.masked_fill(foreign, 0), embedding.weight)
        return parallel.leave(rows.masked_fill(foreign.unsqueeze(-1), 0.0))

    return forward


def whole_logits(head: nn.Module, hidden: Tensor, vocab_size: int, parallel: TensorParallel) -> Tensor:
    """Logits (B, S, vocab_size) in every process, without gradients."""
    part: Tensor = head(hidden)
    width = -(-vocab_size // parallel.size)
    padded = F.pad(part, (0, width - part.shape[-1]))
    pieces = [torch.empty_like(padded) for _ in range(parallel.size)]
    dist.all_gather(pieces, padded.contiguous(), group=parallel.group)
    return torch.cat(pieces, dim=-1)[..., :vocab_size]
