"""What the configuration of an adapter says of it, whatever stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arriero.formats.detection import Found
from arriero.formats.json_file import read_json_object
from arriero.formats.stored_tensors import StoredTensor

LARGEST = 2**63 - 1  # of the numbers that are told


def adapter_facts(found: Found, tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """Method, rank, alpha, layers and base model; a value that is none that an adapter can have is a word for that.

    Raises:
        FormatError: the configuration is no JSON object.
    """
    if found.kind == "gguf-lora":
        from arriero.formats.gguf.file import GGUFFile

        with GGUFFile(found.path) as file:
            alpha = _number(file.metadata.get("adapter.lora.alpha"))
        ranks = sorted({tensor.shape[0] for tensor in tensors if tensor.name.endswith(".lora_a")})
        layers = {tensor.name.rpartition(".weight.")[0].rpartition(".")[2] for tensor in tensors}
        return {"method": "LoRA", "rank": ranks, "alpha": alpha, "targets": sorted(layers)}
    names = {"paddle-lora": "lora_config.json", "paddle-prefix": "prefix_config.json"}
    path = found.path / names.get(found.kind, "adapter_config.json")
    return _facts(found, read_json_object(path, "an adapter has one") if path.is_file() else {})


def _facts(found: Found, values: Mapping[str, Any]) -> dict[str, Any]:
    base = values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        base = "not a name"
    if found.kind.endswith("prefix"):
        return {
            "method": "prefix tuning",
            "tokens": _number(values.get("num_virtual_tokens", values.get("num_prefix_tokens"))),
            "projection": bool(values.get("prefix_projection", False)),
            "base": base,
        }
    words = [
        word for key, word in (("use_rslora", "rank-stabilised"), ("rslora", "rank-stabilised")) if values.get(key)
    ]
    targets = values.get("target_modules")
    return {
        "method": " ".join([*words, "DoRA" if values.get("use_dora") else "LoRA"]),
        "rank": _number(values.get("r")),
        "alpha": _number(values.get("lora_alpha")),
        "targets": _targets(targets),
        "base": base,
    }


def _number(value: Any) -> int | float | str | None:
    """A finite number as it is, words for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return "not a number"
    return value if abs(value) <= LARGEST else "too large a number"


def _targets(value: Any) -> str | list[str]:
    if value is None or isinstance(value, str):
        return value or []
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return sorted(value)
    return "not a list of names"
