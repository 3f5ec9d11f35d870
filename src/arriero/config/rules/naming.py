"""Rules about the model that a command names, or does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.bench import BenchOptions
from arriero.config.export import ExportOptions
from arriero.config.model import ModelOptions
from arriero.config.option import specs_of
from arriero.config.planning import PlanOptions
from arriero.config.pretraining import PretrainModelOptions
from arriero.config.rules.groups import find
from arriero.errors import ConfigError

SMALL_MODEL = "smollm2-135m-instruct"
# A command with one of these, or with --task_name squad, is one of PaddleNLP's scripts: where it names no model, it has theirs.
_OF_PADDLENLP = frozenset({"merge_tensor_parallel_path", "pipeline_parallel_config", "scale_loss"})


def model_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Nothing names a model: one is asked for, and only a command of PaddleNLP's gets its default, which is said."""
    if given & {"model_name_or_path", "model", "config_name"}:
        return
    export, model, bench = find(groups, ExportOptions), find(groups, ModelOptions), find(groups, BenchOptions)
    adapter = find(groups, AdapterPathOptions)
    for name in ("lora_path", "prefix_path"):
        if (path := getattr(adapter, name, None)) is not None and find(groups, PlanOptions) is None:
            raise ConfigError(
                f"--{name} {path}: no model is given, and no adapter_config.json there names one: add --model_name_or_path"
            )
    if export is not None and not Path(export.model_name_or_path).exists():
        raise ConfigError(
            f"no model is given, and {export.model_name_or_path}, PaddleNLP's default, is not here: name one by --model_path"
        )
    if (
        model is None
        or model.model_name_or_path != type(model).model_name_or_path  # of a caller in Python
        or find(groups, PlanOptions) is not None
        or (bench is not None and "serve" in bench.workloads)
        or "api_url" in given
    ):
        return
    if not isinstance(model, PretrainModelOptions) and not _is_of_paddlenlp(groups, given):
        raise ConfigError(
            f"no model is given: add --model_name_or_path with a folder, a named model or a Hub id; {SMALL_MODEL} is a small "
            "one to begin with, and is fetched by its name"
        )
    warnings.append(f"no model is given: {model.model_name_or_path} is taken; --model_name_or_path names another")


def _is_of_paddlenlp(groups: Sequence[Any], given: frozenset[str]) -> bool:
    values = {spec.name: getattr(group, spec.name) for group in groups for spec in specs_of(type(group))}
    return bool(_OF_PADDLENLP & given) or values.get("task_name") == "squad"
