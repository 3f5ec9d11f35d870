"""The proof that a merged model is its base and adapter: every weight is their sum, rounded once, bit for bit."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.adapters.lora import LoRALinear
from arriero.errors import FormatError
from arriero.quantization.linear import QuantizedLinear
from arriero.quantization.schemes import IntegerWeights

TOLERANCE = 1e-4  # of products in fp32, beside the largest of them: another order of additions
_ROWS = 4  # that are multiplied


def _digest(tensor: Tensor) -> str:
    numbers = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(numbers.data, digest_size=16).hexdigest()}"


@torch.no_grad()
def expected_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """What the weights of an adapted model are to be after the merge, by name: known by a digest.

    Of each adapted layer the sum is first compared, in fp32, with what the layer computes without one.

    Args:
        dtype: of the merged model.

    Raises:
        FormatError: a sum that computes something else, or a number that `dtype` cannot hold.
    """
    found: dict[str, str] = {}
    owners = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            _check_sum(name, layer)
            weight = layer.merged().to(dtype)
            _check_finite(f"{name} + adapter", weight, "take --dtype float32, or another adapter")
        elif isinstance(layer, QuantizedLinear):
            weight = layer.dequantized(dtype)
        else:
            continue
        owners.add(name)
        found[f"{name}.weight"] = _digest(weight)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer_name, _, leaf = name.rpartition(".")
        if ".lora_" not in name and (layer_name not in owners or leaf == "bias"):
            weight = parameter.to(dtype)
            if weight.dtype != parameter.dtype and torch.isfinite(parameter).all():
                _check_finite(name, weight, "take --dtype float32")
            found[name] = _digest(weight)
    return found


def _check_finite(name: str, weight: Tensor, way_out: str) -> None:
    """Raises FormatError where a weight of the merged model has numbers that its type cannot hold."""
    if not torch.isfinite(weight).all():
        raise FormatError(
            f"{name} has numbers that are not finite as {str(weight.dtype).removeprefix('torch.')}: {way_out}"
        )


def _check_sum(name: str, layer: LoRALinear) -> None:
    """Raises FormatError where ``x (W + delta)^T + b`` is not what the layer computes of ``x``, itself not rounded."""
    wide = copy.deepcopy(layer)
    if isinstance(wide.scheme, IntegerWeights):
        wide.scheme = replace(wide.scheme, activation=None)
    wide = wide.eval() if layer.base_dtype == torch.float64 else wide.float().eval()
    weight = wide.merged()
    x = torch.randn(_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    apart, bias = wide(x), wide.bias
    joined = F.linear(x, weight, None if bias is None else bias.to(weight))
    difference, size = float((apart - joined).abs().max()), float(apart.abs().max())
    if not difference <= TOLERANCE * size:
        raise FormatError(
            f"{name}: the sum of base and adapter computes other numbers than they do ({difference:.1e} of {size:.1e} apart): "
            "nothing was written"
        )


@torch.inference_mode()
def rounding_noise(model: nn.Module, ids: Tensor) -> float:
    """How far the logits of a prompt move when every weight of a linear layer is off by about one rounding.

    A product ``W x`` then moves by ``eps sqrt(W^2 x^2)`` times a normal number: that is what is added, so that no weight is
    copied but one layer's square at a time. Two ways to compute the same model differ by a few times this.

    Args:
        ids: (1, S) of the prompt.

    Returns:
        The largest difference of a logit.
    """
    plain: Tensor = model(ids)
    generator = torch.Generator().manual_seed(0)

    def nudge(layer: nn.Linear, given: tuple[Tensor], output: Tensor) -> Tensor:
        spread = F.linear(given[0].square(), layer.weight.square()).sqrt_()
        drawn = torch.randn(output.shape, generator=generator).to(output)
        return output + torch.finfo(output.dtype).eps * spread * drawn

    hooks = [layer.register_forward_hook(nudge) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        return float((model(ids) - plain).abs().max())
    finally:
        for hook in hooks:
            hook.remove()


def check_weights(expected: dict[str, str], written: nn.Module, place: object) -> None:
    """
    Args:
        place: what the written model was read from, for messages.

    Raises:
        FormatError: naming the first weight that is not the one of `expected_weights`.
    """
    found = {name: _digest(tensor) for name, tensor in written.named_parameters(remove_duplicate=False)}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        raise FormatError(
            f"{place}: {wrong[0]} ({len(wrong)} of {len(found)} weights) is not base + adapter: nothing was written"
        )
