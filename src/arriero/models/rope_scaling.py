"""The RoPE part of a config.json, in the old style and the new one, as one normalised pair (theta, scaling).

Old (transformers 4): `rope_theta` at the top and `rope_scaling` with `type` or `rope_type`. New (transformers 5):
`rope_parameters` with both inside. Where a file holds both, `rope_scaling` wins, as it does in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.errors import FormatError

# rope type -> the keys that must be there, with a finite positive number each.
REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Optional numbers of yarn; null stands for the default of the paper (https://arxiv.org/abs/2309.00071).
YARN_OPTIONAL_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _positive_number(value: Any, key: str, source: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:  # an int may be any
        raise FormatError(f"{source}: {key} must be a positive number, got {repr(value)[:60]}")
    return value


def read_rope(
    values: Mapping[str, Any], *, max_position_embeddings: int, default_theta: float, source: str
) -> tuple[float, dict[str, Any] | None]:
    """Read the RoPE keys of a configuration.

    Args:
        values: the whole config.json.
        max_position_embeddings: what `original_max_position_embeddings` falls back to (llama3, yarn).
        default_theta: the base when no key gives one.
        source: the name of the file, for messages.

    Returns:
        The base, and None for plain RoPE or a dict with `rope_type` and that type's parameters.

    Raises:
        FormatError: an unsupported type, a missing parameter, a value that is not a positive number.
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    raw = values.get(key) or {}
    if not isinstance(raw, Mapping):
        raise FormatError(f"{source}: {key} must be an object or null, got {raw!r}")
    if raw and all(isinstance(value, Mapping) for value in raw.values()):
        raise FormatError(
            f"{source}: {key} gives each layer type its own RoPE ({', '.join(raw)}), which is not supported"
        )
    theta = raw.get("rope_theta")
    if theta is None:
        theta = values.get("rope_theta")
    theta = float(_positive_number(default_theta if theta is None else theta, "rope_theta", source))
    scaling = {name: value for name, value in raw.items() if name not in ("rope_theta", "type", "rope_type")}
    rope_type = raw.get("rope_type", raw.get("type", "default"))
    return theta, normalise_rope_scaling(
        {"rope_type": rope_type, **scaling},
        max_position_embeddings=max_position_embeddings,
        source=f"{source}: {key}",
        partial_rotary_factor=values.get("partial_rotary_factor"),
    )


def normalise_rope_scaling(
    scaling: Mapping[str, Any] | None,
    *,
    max_position_embeddings: int,
    source: str,
    partial_rotary_factor: Any = None,
) -> dict[str, Any] | None:
    """Check one `rope_scaling` dict and fill in what its type defaults to; None for plain RoPE.

    Raises:
        FormatError: naming the key and the value at fault.
    """
    if scaling is None:
        return None
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in REQUIRED_KEYS:
        raise FormatError(
            f"{source}: rope type {rope_type!r} is not supported; supported are {', '.join(sorted(REQUIRED_KEYS))}"
        )
    partial = scaling.get("partial_rotary_factor", partial_rotary_factor)
    if partial not in (None, 1, 1.0):
        raise FormatError(f"{source}: partial_rotary_factor {partial!r} is not supported; only whole heads are rotated")
    normalised = {"rope_type": rope_type} | {
        key: value for key, value in scaling.items() if key not in ("rope_type", "type", "partial_rotary_factor")
    }
    for key in REQUIRED_KEYS[rope_type]:
        if normalised.get(key) is None:
            raise FormatError(f"{source}: {key} is missing; rope type {rope_type!r} needs it")
        _positive_number(normalised[key], f"{key} of rope type {rope_type!r}", source)
    if rope_type in ("llama3", "yarn"):
        if normalised.get("original_max_position_embeddings") is None:
            normalised["original_max_position_embeddings"] = max_position_embeddings
        _positive_number(normalised["original_max_position_embeddings"], "original_max_position_embeddings", source)
    if rope_type == "llama3" and normalised["high_freq_factor"] <= normalised["low_freq_factor"]:
        raise FormatError(
            f"{source}: high_freq_factor {normalised['high_freq_factor']} must be greater than "
            f"low_freq_factor {normalised['low_freq_factor']}"
        )
    if rope_type == "yarn":
        for key in YARN_OPTIONAL_KEYS:
            if normalised.get(key) is not None:
                _positive_number(normalised[key], key, source)
        if not isinstance(normalised.get("truncate", True), bool):
            raise FormatError(f"{source}: truncate must be true or false, got {normalised['truncate']!r}")
    return None if rope_type == "default" else normalised
