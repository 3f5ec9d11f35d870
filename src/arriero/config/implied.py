"""Values that follow from what is given: the base of an adapter, the learning rate of a method; and an adapter in the place of
a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.optimization import OptimizationOptions, rate_of_method
from arriero.config.option import option_table
from arriero.config.planning import PlanOptions
from arriero.errors import ConfigError


def _has(groups: Sequence[type], kind: type) -> bool:
    return any(issubclass(group, kind) for group in groups)


def take_base_of_adapter(groups: Sequence[type], values: dict[str, Any], warnings: list[str]) -> None:
    """An adapter without a model: the model is the one that it was trained on."""
    named = {"model_name_or_path", "model"} & values.keys()
    if named or not _has(groups, AdapterPathOptions):
        return
    name = next((name for name in ("lora_path", "prefix_path") if values.get(name)), None)
    if name is None or "model_name_or_path" not in option_table(groups):
        return
    from arriero.config.adapter_base import stored_base  # PyYAML, only where a file is read

    base = stored_base(f"--{name}", values[name])
    if base is not None:
        values["model_name_or_path"] = base
        warnings.append(f"no model is given: {base} is taken, which {values[name]} names as its base")


def refuse_adapter_as_model(groups: Sequence[type], values: Mapping[str, Any], prog: str) -> None:
    """An adapter where a model is to be named.

    Raises:
        ConfigError: with the command that works.
    """
    path = values.get("model_name_or_path") or values.get("model")
    if not isinstance(path, str) or not _has(groups, AdapterPathOptions) or _has(groups, PlanOptions):
        return
    folder = Path(path).expanduser()
    if not folder.is_dir() or "model_name_or_path" not in option_table(groups):
        return
    from arriero.config.adapter_base import adapter_kind, stored_base

    name = adapter_kind(folder)
    if name is None:
        return
    if values.get("lora_path") or values.get("prefix_path"):
        return  # of two adapters the loader says where the base goes
    base = stored_base("--model_name_or_path", path)
    if base is None:
        raise ConfigError(
            f"{path} is an adapter and no model, and its adapter_config.json names no base: "
            f"`{prog} --model_name_or_path BASE --{name} {path}`"
        )
    raise ConfigError(f"{path} is an adapter and no model; its base is {base}: `{prog} --{name} {path}`")


def take_learning_rate(groups: Sequence[type], values: dict[str, Any]) -> None:
    """No learning rate: the one that suits what is trained."""
    trains = _has(groups, AdapterOptions) and _has(groups, OptimizationOptions) and not _has(groups, PlanOptions)
    if not trains or "learning_rate" in values or values.get("preference") is not None:
        return
    lora = bool(values.get("lora") or values.get("lora_path"))
    prefix = bool(values.get("prefix_tuning") or values.get("prefix_path"))
    found = rate_of_method(lora=lora, prefix=prefix, network=bool(values.get("prefix_projection")))
    if found is not None:
        values["learning_rate"] = found
