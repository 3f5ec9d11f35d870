"""`quantization_config` of config.json: what it says of a scheme, in the words of compressed-tensors and of bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from arriero.errors import FormatError
from arriero.models.config import QUANTIZATION_METHODS
from arriero.quantization.integers import IntegerScheme
from arriero.quantization.schemes import Activation, Fp8Weights, IntegerWeights, Nf4Weights, WeightScheme

COMPRESSED, BITSANDBYTES = QUANTIZATION_METHODS
# What may stand in an entry: what is read, and what changes no number, each with the values that it may have (None: any).
# Whatever else is there may change what the layers compute, and is refused.
_NOTHING: tuple[Any, ...] = (None, False, "", {}, [])
_SETTINGS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": None,
    "format": None,
    "quantization_status": None,
    "config_groups": None,
    "ignore": None,  # seen from the names of the tensors, as targets are
    "kv_cache_scheme": None,  # see `rounds_cache`
    "global_compression_ratio": None,
    "version": None,
    "run_compressed": None,
    "dequantize": None,
    "transform_config": (*_NOTHING, {"config_groups": {}}),
}
_GROUP: dict[str, tuple[Any, ...] | None] = {
    "targets": None,
    "weights": None,
    "input_activations": None,
    "format": (*_NOTHING, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
}
_ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": None,
    "type": None,
    "symmetric": None,
    "group_size": None,
    "strategy": None,
    "dynamic": None,
    "actorder": None,
    "scale_dtype": None,  # the files say it
    "zp_dtype": None,  # of zero points, which symmetric numbers do not have
    "observer": None,  # how scales were found
    "observer_kwargs": None,
}
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def settings_of(scheme: WeightScheme, dtype: str | None) -> dict[str, Any]:
    """The entry for a model whose linear layers, but for the output head, all have this scheme.

    Args:
        dtype: of the plain weights, as config.json names it; None: float32.
    """
    return _bitsandbytes(dtype) if isinstance(scheme, Nf4Weights) else _compressed_tensors(scheme)


def _compressed_tensors(scheme: WeightScheme) -> dict[str, Any]:
    inputs: dict[str, Any] | None = None
    if scheme.activation is not None:
        dynamic = scheme.activation.dynamic
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": dynamic}
        inputs["strategy"] = "token" if dynamic else "tensor"
    if isinstance(scheme, IntegerWeights):
        group = scheme.integer.group_size
        weights = {"num_bits": scheme.integer.bits, "type": "int", "group_size": group}
        weights["strategy"] = "channel" if group is None else "group"
        layout = "pack-quantized" if scheme.packed else "int-quantized"
    else:
        weights = {"num_bits": 8, "type": "float", "group_size": None, "strategy": "channel"}
        layout = "float-quantized"
    weights |= {"symmetric": True, "dynamic": False}
    layers = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": COMPRESSED,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": layers},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _bitsandbytes(dtype: str | None) -> dict[str, Any]:
    return {
        "quant_method": BITSANDBYTES,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def compressed_scheme(settings: Mapping[str, Any], packed: bool, scale_dtype: torch.dtype) -> WeightScheme:
    """The scheme of an entry of compressed-tensors.

    Args:
        packed: whether the files hold several integers in one number.
        scale_dtype: of the scales in the files.

    Raises:
        FormatError: for one that is not read here.
    """
    _refuse_unknown(settings, _SETTINGS, "")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or settings.get("format") not in _FORMATS:
        raise FormatError(f"only one config group, in one of the formats {', '.join(_FORMATS)}, is read")
    group = next(iter(groups.values()))
    if isinstance(group, dict):
        _refuse_unknown(group, _GROUP, "a group's ")
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not weights.get("symmetric", True) or weights.get("dynamic"):
        raise FormatError("only symmetric, static weights are read")
    _refuse_unknown(weights, _ARGUMENTS, "weights: ")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise FormatError(f"the order of activations (actorder {weights['actorder']!r}) is not read")
    bits, kind, strategy, size = (weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    activation = _activation(group.get("input_activations"))
    if kind == "float" and bits == 8 and strategy == "channel" and activation is None:
        return Fp8Weights(scale_dtype)
    if kind != "int" or bits not in (4, 8) or strategy not in ("channel", "group"):
        raise FormatError(
            f"weights of {bits!r} bits, type {kind!r}, strategy {strategy!r} are not read: int of 4 or 8 bits by channel or "
            "group, or float of 8 bits by channel without activations"
        )
    if strategy == "group" and (not isinstance(size, int) or size < 1):
        raise FormatError(f"a group_size of {size!r}")
    scheme = IntegerScheme(bits, size if strategy == "group" else None)
    return IntegerWeights(scheme, scale_dtype, activation, packed)


def _activation(inputs: Any) -> Activation | None:
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        _refuse_unknown(inputs, _ARGUMENTS, "input_activations: ")
    if isinstance(inputs, dict) and (inputs.get("num_bits"), inputs.get("type")) == (8, "int"):
        dynamic, strategy = inputs.get("dynamic"), inputs.get("strategy")
        if inputs.get("symmetric", True) and (dynamic, strategy) in ((True, "token"), (False, "tensor")):
            return Activation(bool(dynamic))
    raise FormatError("activations are read as symmetric 8-bit integers, dynamic by token or static by tensor")


def rounds_cache(settings: Mapping[str, Any]) -> bool:
    """Whether an entry of compressed-tensors asks for keys and values in few bits, which are kept whole here."""
    return settings.get("kv_cache_scheme") not in _NOTHING


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], where: str) -> None:
    """Raises FormatError for a key that may change what is computed, in a way that is not done here."""
    for key, value in values.items():
        allowed = known.get(key, _NOTHING)
        dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if allowed is not None and value not in allowed and not dense:
            raise FormatError(
                f"{where}{key[:60]} is {str(value)[:60]}, which is not read here and may change the model"
            )
