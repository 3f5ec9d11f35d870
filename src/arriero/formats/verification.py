"""Whether a converted model is the one it was made from: every tensor, the configuration, and the logits of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from arriero.errors import FormatError
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.shard_forward import whole_logits
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.rope import RotaryEmbedding, rope_frequencies

PROMPT_TOKENS = 32
_BLOCK = 2**20  # numbers of a tensor that are cast at a time
# Of what a model computes: two configurations that agree in these compute the same.
_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
)
# Distance of two neighbouring fp32 numbers: files that hold fp32 constants.
_FP32 = 2**-23


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        tensors: how many were compared.
        rounded: how many differ from the original, as their number format makes them.
        largest: relative difference of a tensor, ``|a - b| / |a|`` in Frobenius norms; 0 where all are equal.
        worst: the tensor it is in.
        logits: largest difference of a logit of the prompt, and the largest logit; None if they were not computed.
    """

    tensors: int
    rounded: int
    largest: float
    worst: str
    logits: tuple[float, float] | None

    def __str__(self) -> str:
        if self.rounded == 0:
            text = f"all {self.tensors} tensors equal"
        else:
            text = f"{self.rounded} of {self.tensors} tensors rounded, by at most {self.largest:.1e} of their norm"
            text += f" ({self.worst})"
        if self.logits is not None:
            text += f"; logits of a prompt differ by at most {self.logits[0]:.1e}, largest logit {self.logits[1]:.1f}"
        return text


def compare(
    source: ModelSource,
    written: ModelSource,
    *,
    dtype: torch.dtype | None,
    lossy: bool,
    logits: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare what was written with what it was made from, a tensor at a time; callers remove what is not the same.

    Args:
        dtype: that the tensors were cast to; each must be equal to its original so rounded. None: nothing was rounded.
        lossy: the format keeps fewer bits (a quantised GGUF file), so that differences are told and not judged.
        logits: whether to compute those of a fixed prompt too, in fp32, each model in its turn. They are judged where all
            tensors are equal and the original does not round its inputs.
        progress: told bytes compared and bytes in all, after each tensor.

    Raises:
        FormatError: naming the tensor, or key of the configuration, that is not what it should be.
    """
    _compare_configs(source.config, written.config, written)
    odd = source.tensors.keys() ^ written.tensors.keys()
    if odd:
        raise FormatError(
            f"{written.path}: {sorted(odd)[0]} is in only one of the original and the converted model: nothing was kept"
        )
    total, done = sum(prod(value.shape) * value.dtype.itemsize for value in source.tensors.values()), 0
    rounded, largest, worst = 0, 0.0, ""
    for name, value in source.tensors.items():
        original, found = _load(value), _load(written.tensors[name])
        if original.shape != found.shape:
            raise FormatError(
                f"{written.path}: {name} has the shape {list(found.shape)}, the original has {list(original.shape)}: "
                "nothing was kept"
            )
        if not same_numbers(original, found):
            if not lossy and (dtype is None or not same_numbers(original, found, dtype)):
                raise FormatError(f"{written.path}: {name} differs from the original{_of(dtype)}: nothing was kept")
            rounded += 1
            difference = relative_difference(original, found)
            if not difference <= largest:
                largest, worst = difference, name
        del original, found  # before the next two are made
        done += prod(value.shape) * value.dtype.itemsize
        if progress is not None:
            progress(done, total)
    apart = _compare_logits(source, written) if logits else None
    judged = apart is not None and rounded == 0 and source.computing is None
    if judged and apart is not None and apart[0] > 1e-5 * max(1.0, apart[1]):
        raise FormatError(
            f"{written.path}: all tensors are equal, but logits differ by {apart[0]:.1e}: nothing was kept"
        )
    return Comparison(len(source.tensors), rounded, largest, worst, apart)


def _of(dtype: torch.dtype | None) -> str:
    return f" rounded to {str(dtype).removeprefix('torch.')}" if dtype is not None else ""


def _load(value: Tensor | LazyTensor) -> Tensor:
    return value.load() if isinstance(value, LazyTensor) else value.detach()


def same_numbers(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors of one shape hold the same numbers (of the same dtype: the same bits), not-a-numbers included.

    Args:
        dtype: to round the first one to before.
    """
    return all(_same_rows(a if dtype is None else a.to(dtype), b) for a, b in _blocks(one, other))


def _same_rows(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype:
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
        return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
    wide = torch.promote_types(one.dtype, other.dtype)  # holds both exactly: of two of 16 bits it is fp32
    one, other = one.to(wide), other.to(wide)
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def relative_difference(original: Tensor, other: Tensor) -> float:
    """``|a - b| / |a|`` in Frobenius norms; infinite where only one of them is finite."""
    size = apart = 0.0
    for a, b in _blocks(original, other):
        size = math.hypot(size, float(a.double().norm()))
        apart = math.hypot(apart, float((a.double() - b.double()).norm()))
    if not math.isfinite(apart):
        return math.inf
    return apart / size if size else apart


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of both at a time, so that what is cast of them takes little memory."""
    rows, others = (tensor if tensor.dim() else tensor[None] for tensor in (one, other))
    step = max(1, _BLOCK * len(rows) // max(1, rows.numel()))
    return zip(torch.split(rows, step), torch.split(others, step), strict=True)


def _compare_configs(original: LlamaConfig, other: LlamaConfig, written: ModelSource) -> None:
    for key in _KEYS:
        wanted, found = getattr(original, key), getattr(other, key)
        if not _alike(wanted, found):
            raise FormatError(f"{written.path}: {key} is {found}, the original's is {wanted}: nothing was kept")
    _compare_positions(original, other, written)
    for layer in range(original.num_hidden_layers):
        wanted, found = original.layer_sliding_window(layer), other.layer_sliding_window(layer)
        if wanted != found:
            raise FormatError(
                f"{written.path}: the window of layer {layer} is {found}, the original's is {wanted}: nothing was kept"
            )


def _compare_positions(original: LlamaConfig, other: LlamaConfig, written: ModelSource) -> None:
    """RoPE by what it computes: formats have several ways to say the same scaling."""
    (wanted, factor), (found, other_factor) = rope_frequencies(original), rope_frequencies(other)
    dynamic = [config.rope_scaling if _is_dynamic(config) else None for config in (original, other)]
    if (
        wanted.shape != found.shape
        or not torch.allclose(wanted, found, rtol=1e-5, atol=0)
        or not math.isclose(factor, other_factor, rel_tol=1e-5)
        or dynamic[0] != dynamic[1]
    ):
        raise FormatError(
            f"{written.path}: RoPE is {other.rope_scaling or 'plain'} with rope_theta {other.rope_theta:g}, the original's is "
            f"{original.rope_scaling or 'plain'} with {original.rope_theta:g}: nothing was kept"
        )


def _is_dynamic(config: LlamaConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling["rope_type"] == "dynamic"


def _alike(one: object, other: object) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=_FP32)  # type: ignore[arg-type]
    return one == other


def _compare_logits(source: ModelSource, written: ModelSource) -> tuple[float, float]:
    """The largest difference, and the largest logit."""
    before, after = prompt_logits(source), prompt_logits(written)
    return float((before - after).abs().max()), float(before.abs().max())


def prompt_logits(source: ModelSource) -> Tensor:
    """(S, vocab_size) logits of a fixed prompt, computed in fp32 from the weights as they are stored."""
    ids = torch.arange(PROMPT_TOKENS)[None] * 7919 % source.config.vocab_size
    if source.computing is not None:
        return whole_logits(source.computing(), ids)[0]
    config = source.config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: nn.Parameter(_load(value), requires_grad=False) for name, value in source.tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.to_empty(device="cpu")
            module.reset()
    return whole_logits(model.eval(), ids)[0]
