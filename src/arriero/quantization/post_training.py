"""Quantizing a trained model, layer after layer; a layer is calibrated on what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arriero.errors import ConfigError
from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig
from arriero.models.llama import DecoderLayer, LlamaForCausalLM
from arriero.quantization.awq import Repeats, best_factors, fold
from arriero.quantization.linear import QuantizedLinear, replace_layer
from arriero.quantization.rounding import gptq, searched_scales
from arriero.quantization.schemes import IntegerWeights, WeightScheme

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Group:
    """Linear layers of a decoder layer that share their input, and what makes it."""

    previous: str
    layers: tuple[str, ...]


_GROUPS = (
    _Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    _Group("self_attn.v_proj", ("self_attn.o_proj",)),
    _Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    _Group("mlp.up_proj", ("mlp.down_proj",)),
)


class InputStatistics:
    """What a linear layer's inputs are like, over all calibration tokens.

    Args:
        size: inputs.
        with_moments: whether the second moments are wanted, (size, size) of them.
    """

    def __init__(self, size: int, *, with_moments: bool, device: torch.device | str = "cpu") -> None:
        self.tokens, self.greatest = 0, 0.0
        self._magnitude = torch.zeros(size, device=device)
        self._moments = torch.zeros(size, size, device=device) if with_moments else None

    def add(self, x: Tensor) -> None:
        """Count (..., size) inputs in."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        self.greatest = max(self.greatest, float(rows.abs().max()))
        self._magnitude += rows.abs().sum(0)
        if self._moments is not None:
            self._moments.addmm_(rows.t(), rows)

    @property
    def magnitude(self) -> Tensor:
        """(size,), the mean magnitude of each input."""
        return self._magnitude / max(1, self.tokens)

    @property
    def moments(self) -> Tensor:
        """(size, size), the mean of ``x x^T``."""
        assert self._moments is not None
        return self._moments / max(1, self.tokens)

    def scale(self, factors: Tensor) -> None:
        """Follow inputs that are divided by `factors` from now on."""
        self._magnitude /= factors
        if self._moments is not None:
            self._moments /= factors[:, None] * factors
        self.greatest = float("nan")  # unknown: each input had its own


def needs_data(scheme: WeightScheme, method: str) -> bool:
    """Whether calibration tokens are needed."""
    return method in ("gptq", "awq") or _static(scheme)


def _static(scheme: WeightScheme) -> bool:
    return scheme.activation is not None and not scheme.activation.dynamic


def check_method(scheme: WeightScheme, method: str) -> None:
    """Raises ConfigError where a method does not go with a scheme."""
    if method in ("gptq", "awq") and not isinstance(scheme, IntegerWeights):
        raise ConfigError(
            f"--quant_method {method} is for integers: give --quant_type int8, int4 or a8w8, or leave out --quant_method"
        )


@torch.no_grad()
def quantize_model(
    model: LlamaForCausalLM,
    scheme: WeightScheme,
    method: str = "rtn",
    blocks: Sequence[Tensor] = (),
    storage: torch.dtype = torch.float32,
    on_layer: Callable[[int], object] | None = None,
) -> None:
    """Quantize every linear layer of the decoder layers, in place; embedding, norms and output head stay.

    Held besides the model: the hidden states of the calibration tokens at one layer, and the second moments of one layer's
    inputs.

    Args:
        method: "rtn", "gptq" or "awq". Integers get a searched range in each; nf4 and fp8 the rule of the format.
        blocks: calibration tokens, (1, T) int64 each, all of one length.
        storage: in which the plain weights will be stored.
        on_layer: called with 1 after each layer.

    Raises:
        ConfigError: if the method does not go with the scheme, or lacks data.
    """
    check_method(scheme, method)
    if needs_data(scheme, method) and not blocks:
        raise ConfigError(f"--quant_method {method} with these activations needs calibration data: give --data_file")
    hidden = list(_embedded(model, blocks)) if needs_data(scheme, method) else []
    for layer in model.model.layers.children():
        assert isinstance(layer, DecoderLayer)
        _quantize_layer(layer, model, scheme, method, hidden, storage)
        if on_layer is not None:
            on_layer(1)


def _quantize_layer(
    layer: DecoderLayer,
    model: LlamaForCausalLM,
    scheme: WeightScheme,
    method: str,
    hidden: list[Tensor],
    storage: torch.dtype,
) -> None:
    statistics: list[InputStatistics | None] = [None] * len(_GROUPS)
    if hidden:
        found = _statistics(layer, model, hidden, with_moments=method != "rtn")
        if method == "awq":
            assert isinstance(scheme, IntegerWeights)
            for group, own in zip(_GROUPS, found, strict=True):
                _scale(layer, group, own, scheme, model.config, storage)
            if _static(scheme):  # the ranges of the scaled inputs
                found = _statistics(layer, model, hidden, with_moments=True)
        statistics = [*found]
    for group, inputs in zip(_GROUPS, statistics, strict=True):
        for name in group.layers:
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            stored = _stored(linear.weight.float(), scheme, method, inputs)
            replace_layer(layer, name, QuantizedLinear.from_linear(linear, scheme, stored))
    for number, states in enumerate(hidden):
        hidden[number] = _run(layer, model, states)


def _stored(weight: Tensor, scheme: WeightScheme, method: str, inputs: InputStatistics | None) -> dict[str, Tensor]:
    if not isinstance(scheme, IntegerWeights):
        return scheme.quantize(weight)
    importance = None if inputs is None or method == "rtn" else inputs.moments.diagonal()
    scales = searched_scales(weight, scheme.integer, scheme.scale_dtype, importance)
    if method == "gptq":
        assert inputs is not None
        stored = scheme.pack(gptq(weight, scales.float(), scheme.integer, inputs.moments), scales)
    else:
        stored = scheme.store(weight, scales)
    if _static(scheme):
        assert inputs is not None
        stored["input_scale"] = torch.tensor([max(inputs.greatest, 1e-12) / 127], device=weight.device)
    return stored


def _scale(
    layer: DecoderLayer,
    group: _Group,
    inputs: InputStatistics,
    scheme: IntegerWeights,
    config: LlamaConfig,
    storage: torch.dtype,
) -> None:
    layers = [layer.get_submodule(name) for name in group.layers]
    linears = [linear for linear in layers if isinstance(linear, nn.Linear)]
    by_head = group.previous == "self_attn.v_proj"
    repeats = (
        Repeats(config.num_attention_heads // config.num_key_value_heads, config.head_dim) if by_head else Repeats()
    )
    weights = [linear.weight.float() for linear in linears]
    factors = best_factors(weights, scheme.integer, inputs.magnitude, inputs.moments, repeats)
    inputs.scale(fold(layer.get_submodule(group.previous), linears, factors, repeats, storage))


def _embedded(model: LlamaForCausalLM, blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    """The blocks' hidden states before the first layer, several blocks at once: (B, T, hidden)."""
    together = max(1, _TOKENS_AT_ONCE // blocks[0].shape[1])
    device = model.model.embed_tokens.weight.device
    for start in range(0, len(blocks), together):
        yield model.model.embed_tokens(torch.cat(list(blocks[start : start + together])).to(device))


def _run(layer: DecoderLayer, model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    lengths = torch.full_like(positions, hidden.shape[1]) if model.model.rotary.is_dynamic else None
    output: Tensor = layer(hidden, model.model.rotary(positions, hidden.dtype, lengths), AttentionInfo.causal())
    return output


def _statistics(
    layer: DecoderLayer, model: LlamaForCausalLM, hidden: Sequence[Tensor], *, with_moments: bool
) -> list[InputStatistics]:
    """Of the inputs of each group."""
    firsts = [layer.get_submodule(group.layers[0]) for group in _GROUPS]
    found = [
        InputStatistics(int(first.in_features), with_moments=with_moments, device=hidden[0].device)  # type: ignore[arg-type]
        for first in firsts
    ]
    with _watched(dict(zip(firsts, found, strict=True))):
        for states in hidden:
            _run(layer, model, states)
    return found


@contextmanager
def _watched(watched: dict[nn.Module, InputStatistics]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, own=own: own.add(inputs[0]))
        for module, own in watched.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
